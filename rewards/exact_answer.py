"""1 if the text in the last <answer> tags equals the `answer` column, else 0."""

from __future__ import annotations

from typing import Any

from nanorlhf.data.answers import last_tagged, text_of


def exact_answer(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Exact match of the tagged answer, white space around it aside; None if the column is empty."""
    return [
        None if right is None else float(last_tagged(text_of(completion)) == str(right).strip())
        for completion, right in zip(completions, answer, strict=True)
    ]
