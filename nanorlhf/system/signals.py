"""Ctrl-C and SIGTERM while a run starts: both interrupt it, and what a library swallows is raised again."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
INTERRUPTED = 130  # the status that a shell gives a command which Ctrl-C has ended
_heard: list[int] = []  # since the outermost `listening` began


def interrupt(number: int, _: object) -> None:
    """Raises KeyboardInterrupt, and notes it: while Python runs a `__del__` or a callback, an exception is lost."""
    _heard.append(number)
    raise KeyboardInterrupt


def interrupt_or_end(number: int, _: object) -> None:
    """Interrupts at the first signal and ends the process at the second."""
    if _heard:
        os._exit(INTERRUPTED)  # nothing can swallow it
    interrupt(number, _)


def heed() -> None:
    """Raises the KeyboardInterrupt that was lost, if one was."""
    if _heard:
        raise KeyboardInterrupt


@contextmanager
def listening(ends: bool = False) -> Iterator[None]:
    """Signals raise KeyboardInterrupt at once, or at the end at the latest; with `ends` a second one ends the process.

    Within another `listening`, or off the main thread, which hears no signals, only the end is looked at.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) in (interrupt, interrupt_or_end):
        yield
        heed()
        return
    before = {number: signal.signal(number, interrupt_or_end if ends else interrupt) for number in NAMES}
    tell_of_lost = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if lost.exc_type is KeyboardInterrupt else tell_of_lost(lost)
    try:
        yield
    finally:
        sys.unraisablehook = tell_of_lost
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's
        lost = bool(_heard)
        _heard.clear()
        if lost:  # or made something else of
            raise KeyboardInterrupt


@contextmanager
def handled(react: Callable[[str], object], unless: type[BaseException]) -> Iterator[None]:
    """Hands a signal's name to `react`, on the main thread; after an `unless` handlers stay as they are.

    Of several processes the launcher ends the others with SIGTERM when one is lost, and there is something left to say.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda number, _: react(NAMES[number])) for number in NAMES}
    try:
        heed()
        yield
    except unless:
        before.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminating_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt too, each time."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
