"""Mistakes that are the user's to mend, each said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A setting that cannot work, answered before anything costly starts."""


class RunError(RuntimeError):
    """A run that cannot go on, which is nobody's mistake or not at the door; said in one line."""


class RewardError(RunError):
    """A reward function that raised, or that returned what no reward can be."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of `known`."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)
    return f"did you mean {close[0]!r}?" if close else "there is none yet"
