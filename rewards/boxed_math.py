r"""1 if the last \boxed{} holds the mathematics of the `answer` column, else 0, as math-verify judges it.

Boxes that belong together, as in \boxed{1} and \boxed{2}, are one answer. Without a box, math-verify looks for an
answer in the text, unless `need_boxed` is set. The column holds a number, LaTeX or a text with LaTeX in it; if
math-verify can read nothing in it the reward is None.

What is too large to work out or too deep to parse scores 0 unseen. The rest is given SECONDS to be read and as many to
be compared, by an alarm, which only a process's main thread has.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from nanorlhf.data.answers import Box, boxes, text_of
from nanorlhf.errors import UsageError
from nanorlhf.rewards._latex import is_modest

SECONDS = 2
LONGEST = 1_000  # characters of an answer
TAIL = 4_000  # characters of a text without a box that are read, from its end
TOGETHER = re.compile(
    r"(?:[\s$.,;&]|\\[()\[\],;:! ]|\\q?quad|\b(?:and|or)\b|\\(?:text|mbox|textrm)\s*\{[^{}]{0,40}\})*"
)
SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b")
PERCENT = re.compile(r"[\s$]*(?:\\?%|[Pp]ercent|[Pp]ct)")
BOX = re.compile(r"\\+(?:boxed|fbox)\s*(?=\{)")
MARKED = re.compile(r"(?<!\\)\$|\\[(\[]|\\boxed|\\fbox")
PROSE = re.compile(r"(?<=\d)!|\b[ACP]\b")
PLAIN = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d*)\.?\d*\s*%?")


def boxed_math(
    completions: list[Any], answer: list[Any], *, need_boxed: bool = False, decimals: int = 6, **_: Any
) -> list[float | None]:
    """Whether the answers are the same; `decimals`: places to which decimal fractions must agree."""
    return [
        None if right is None else judged(text_of(completion), str(right), need_boxed, decimals)
        for completion, right in zip(completions, answer, strict=True)
    ]


def check(decimals: int, **_: Any) -> None:
    """Refuses places that no comparison can have."""
    if type(decimals) is not int or not 0 <= decimals <= 15:
        raise UsageError(f"reward_options: boxed_math's decimals={decimals!r} must be a whole number from 0 to 15")


def judged(text: str, right: str, need_boxed: bool, decimals: int) -> float | None:
    """The score of one completion."""
    expected = gold(right)
    if not expected:
        return None
    said = answer_in(text, need_boxed)
    return float(said is not None and same(expected, read(said), decimals))


def answer_in(text: str, need_boxed: bool) -> str | None:
    """The LaTeX or the text to be judged, if there is any that can be."""
    found = boxes(text)
    if found:
        said = " ".join(together(text, found).split())  # math-verify reads no formula across lines
        return f"${said}$" if len(said) <= LONGEST and is_modest(said) else None
    if need_boxed:
        return None
    tail = text[-TAIL:]
    return next((part for part in (tail, tail.strip().rpartition("\n")[2]) if is_modest(formulas(part))), None)


def formulas(prose: str) -> str:
    """The text less what reads as a factorial in LaTeX alone: `25,000!` and `A 25,000 gallon tank`."""
    return prose if "\\" in prose or prose.count("$") > 1 else PROSE.sub(" ", prose)


def together(text: str, found: list[Box]) -> str:
    """The contents of the last box, with those before it that are part of the same answer."""
    contents = [found[-1].content]
    for before, after in zip(found[-2::-1], found[:0:-1], strict=True):
        between = text[before.end : after.start]
        apart = len(between) >= 10 and not SEPARATOR.search(between)
        if len(between) >= 70 or apart or not TOGETHER.fullmatch(between):
            break
        if before.content not in contents:
            contents.insert(0, before.content)
    percent = r"\%" if PERCENT.match(text, found[-1].end) else ""
    return BOX.sub("", ", ".join(contents)) + percent


@lru_cache(maxsize=4096)
def gold(right: str) -> tuple[Any, ...]:
    """The column's answer as SymPy's expressions; nothing if there is none."""
    right = right.strip().removeprefix("+")
    if MARKED.search(right):
        said = answer_in(right, need_boxed=False)
    elif len(right) <= LONGEST and is_modest(right):
        said = right if PLAIN.fullmatch(right) else f"${' '.join(right.split())}$"
    else:
        said = None
    parsed = read(said) if said else []
    return tuple(parsed) if any(not isinstance(one, str) for one in parsed) else ()


def read(said: str) -> list[Any]:
    """Parses LaTeX or a text by math-verify: an expression and its words; nothing if it gives up."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    latex, numbers = LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()
    whole = said.startswith("$") and said.endswith("$")  # then a number in what cannot be parsed is no answer
    ways = (latex,) if whole else (latex, numbers)
    return within_time(lambda: parse(said, ways, parsing_timeout=None)) or []  # type: ignore[arg-type]


def same(expected: tuple[Any, ...], said: list[Any], decimals: int) -> bool:
    """Whether math-verify takes the two for the same; its arguments do not commute."""
    from math_verify import verify

    return bool(within_time(lambda: verify(list(expected), said, float_rounding=decimals, timeout_seconds=None)))


class LateError(BaseException):
    """Time is up; no `except Exception` of a library's stops this."""


def within_time(act: Callable[[], Any]) -> Any:
    """The result of a call that has SECONDS, or None; in other threads than the main one there is no alarm."""
    if threading.current_thread() is not threading.main_thread():
        with quiet():
            return act()
    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS / 4)  # again, if all the same something stopped it
            with quiet():
                return act()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except LateError:
        signal.setitimer(signal.ITIMER_REAL, 0)  # it may have rung just before that was said
        return None
    finally:
        signal.signal(signal.SIGALRM, before)


def ring(*_: object) -> None:
    raise LateError


@contextmanager
def quiet() -> Iterator[None]:
    """Without Python's warnings about a completion's syntax and math-verify's log: there would be millions of them."""
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
