"""Answers in text: boxed, or the last number."""

from __future__ import annotations

import re
from typing import Any


def after(mark: str, text: Any) -> str | None:
    """The text behind the last `mark`, to the end of the line."""
    return text.rpartition(mark)[2].strip().partition("\n")[0] if isinstance(text, str) and mark in text else None


def last_boxed(text: Any) -> str | None:
    r"""The contents of the last \boxed{...}, inner braces and all; None if there is none, or it does not end."""
    start = text.rfind("\\boxed{") + len("\\boxed{") if isinstance(text, str) and "\\boxed{" in text else 0
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL) if start else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()].strip()
    return None


def last_number(text: Any) -> str | None:
    """The last number of a text, without commas."""
    found = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text) if isinstance(text, str) else []
    return found[-1].replace(",", "") if found else None
