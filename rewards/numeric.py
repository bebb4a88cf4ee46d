r"""1 if the completion's number is the one in the `answer` column, which may be written as GSM8K does.

The number is the last one in <answer> tags, else right after the last ####, else in the last \boxed{}, else in the
whole text. A form that is there counts even if no number stands in it. Numbers are compared exactly, as fractions:
0.5 is 1/2; $, units and % are not read, so 50% is 50.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from nanorlhf.data.answers import after, last_boxed, last_number, last_tagged, numbers, text_of
from nanorlhf.errors import UsageError

LEADS = re.compile(r"[\s*_=:(\\$€£+\u2010-\u2013\u2212-]*(?:\d|\.\d|[dt]?frac)")  # to a number


def numeric(
    completions: list[Any], answer: list[Any], *, strict: bool = False, tolerance: float = 0.0, **_: Any
) -> list[float | None]:
    """Whether the number is right; `strict`: only one in tags, after #### or in a box; `tolerance`: how far off."""
    allowed = Fraction(str(tolerance))
    return [
        None if right is None else judged(number_of(text_of(completion), strict), right, allowed)
        for completion, right in zip(completions, map(gold, answer), strict=True)
    ]


def check(tolerance: float, **_: Any) -> None:
    """Refuses a tolerance that is no distance."""
    if not 0 <= tolerance < float("inf"):
        raise UsageError(f"reward_options: numeric's tolerance={tolerance!r} must be a number, 0 or more")


def judged(said: Fraction | None, right: Fraction, allowed: Fraction) -> float:
    """1 for what is near enough."""
    return float(said is not None and abs(said - right) <= allowed)


def number_of(text: str, strict: bool = False) -> Fraction | None:
    """The number that a text gives as its answer."""
    form = form_of(text)
    if form is None and strict:
        return None
    return last_number(text if form is None else form)


def form_of(text: str) -> str | None:
    """The text that is marked as the answer, if any is."""
    tagged = last_tagged(text)
    marked = after("####", text) if tagged is None else tagged
    if tagged is None and marked and not LEADS.match(marked):  # a heading
        marked = None
    return last_boxed(text) if marked is None else marked


def gold(answer: Any) -> Fraction | None:
    """The column's number: a marked one, or else the only one; nothing if that is not clear."""
    text = str(answer)
    form = form_of(text)
    if form is not None:
        return last_number(form)
    found = numbers(text)
    return found[0] if len(found) == 1 else None
