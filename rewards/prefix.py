"""The share of the answer that a completion gives before its first mistake, word by word: 1 for all of it and no more.

reward = matching words from the start / words of the answer or of the completion, whichever has more. Where work is
done step by step it says how far it was right.
"""

from __future__ import annotations

from itertools import takewhile
from operator import eq
from typing import Any

from nanorlhf.data.answers import text_of


def prefix(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Compares each completion with the `answer` column; None if that has no words."""
    return [
        share(text_of(completion).split(), str(right).split()) if right is not None and str(right).split() else None
        for completion, right in zip(completions, answer, strict=True)
    ]


def share(said: list[str], right: list[str]) -> float:
    """Words alike from the start, of all."""
    alike = sum(1 for _ in takewhile(bool, map(eq, said, right)))
    return alike / max(len(said), len(right))
