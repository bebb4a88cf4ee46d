"""A penalty for saying the same again: 0 if no n-gram comes twice, down to -max_penalty if one is all there is.

-max_penalty * (1 - distinct n-grams / n-grams), as in open-r1, after Demystifying Long Chain-of-Thought Reasoning
(arXiv:2502.03373). The grams are of tokens, which the trainer always gives (`completion_ids`), so that scripts without
spaces and repeated letters count too; called without them, of words between white space, in lower case.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from nanorlhf.data.answers import text_of
from nanorlhf.errors import UsageError


def repetition(
    completions: list[Any],
    completion_ids: list[list[int]] | None = None,
    *,
    ngram_size: int = 3,
    max_penalty: float = 1.0,
    **_: Any,
) -> list[float]:
    """The penalty, 0 or below; 0 for what is shorter than an n-gram."""
    units: Sequence[Sequence[Hashable]] = (
        [text_of(completion).lower().split() for completion in completions]
        if completion_ids is None
        else completion_ids
    )
    return [max_penalty * (distinct_share(said, ngram_size) - 1) for said in units]


def check(ngram_size: int, max_penalty: float) -> None:
    """Refuses options that cannot work."""
    if type(ngram_size) is not int or ngram_size < 1:
        raise UsageError(f"reward_options: repetition's ngram_size={ngram_size!r} must be a whole number above 0")
    if not 0 < max_penalty < float("inf"):
        raise UsageError(f"reward_options: repetition's max_penalty={max_penalty!r} must be a number above 0")


def distinct_share(said: Sequence[Hashable], size: int) -> float:
    """Distinct n-grams over n-grams; 1 if there is none."""
    grams = list(zip(*(said[i:] for i in range(size)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
