"""The beginning of a command: signals are heard first, then what takes time is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from nanorlhf.system.signals import INTERRUPTED, listening


def command(name: str) -> Callable[..., int]:
    """The `main` of an algorithm's folder: parses, trains, and gives its exit status.

    0: done; 1: the run could not go on; 2: a mistake of the user's; 130: interrupted.
    """

    def main(argv: list[str] | None = None) -> int:
        try:
            with listening(ends=True):
                return import_module("nanorlhf.cli").run(name, argv)
        except KeyboardInterrupt as interrupt:
            if import_module("nanorlhf.system.terminal").speaks():
                print("; ".join([f"nanorlhf {name}: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
            return INTERRUPTED

    return main


def lazily(package: str, names: Sequence[str]) -> Callable[[str], Any]:
    """An algorithm's `__getattr__`, which imports its options or itself on first use: a command answers at once."""

    def load(name: str) -> Any:
        if name not in names:
            raise AttributeError(name)
        return getattr(import_module(f"{package}.{'config' if name.endswith('Config') else 'algorithm'}"), name)

    return load
