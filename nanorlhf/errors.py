"""Mistakes that are the user's to mend, each said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

NEAR = 0.65  # difflib's ratio, from which on a name may have been meant
FEW = 12  # names that are listed


class UsageError(ValueError):
    """A setting that cannot work, answered before anything costly starts."""

    def __str__(self) -> str:
        return plain(super().__str__(), keep="")


class RunError(RuntimeError):
    """A run that cannot go on: no mistake of the user's, or one that shows only later; said in one line."""

    def __str__(self) -> str:
        return plain(super().__str__())


class RewardError(RunError):
    """A reward function that raised, or that returned what no reward can be."""


def plain(text: str, keep: str = "\n") -> str:
    """Text that may go to a terminal or a log: what it cannot print is written as Python would, all but `keep`."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def error_line(error: BaseException) -> str:
    """The error in one line: its type and its message."""
    return plain(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str], listed: bool = False) -> str:
    """A hint that names the closest of `known`; if none is close, all, unless they are many or `listed` anyway."""
    names = sorted(one for one in known if not one.startswith("_"))
    if close := difflib.get_close_matches(name, names, n=1, cutoff=NEAR):
        return f"did you mean {close[0]!r}?"
    if not names:
        return "there is none yet"
    return "none is like it" if listed or len(names) > FEW else f"known are {', '.join(names)}"


def shown(value: Any) -> str:
    """A value in a message, cut short."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
