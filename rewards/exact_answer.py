"""1 where the text in the last <answer> tags equals the `answer` column, else 0."""

from __future__ import annotations

import re
from typing import Any

TAGS = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def exact_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Exact match of the tagged answer."""
    return [
        float(extract(text_of(completion)) == str(right).strip())
        for completion, right in zip(completions, answer, strict=True)
    ]


def extract(text: str) -> str | None:
    """What the last pair of answer tags holds."""
    found = TAGS.findall(text)
    return found[-1] if found else None


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, plain or conversational."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
