"""Answers to be scored: which two of a row, and their tokens as a sequence classifier reads them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from nanorlhf.data.row_schemas import UnfitError, agreement, content
from nanorlhf.data.row_to_prompt import ReadRow
from nanorlhf.data.templates import conversation_ids
from nanorlhf.errors import UsageError, shown
from nanorlhf.rollouts.demonstrations import Demonstrations, preference
from nanorlhf.types import Prompt, Sample


def better_and_worse(read: ReadRow) -> list[str]:
    """A pair: what was chosen and what was rejected, or of graded answers the best one and the worst one."""
    if not {"completions", "scores"} <= read.columns.keys():
        return preference(read)
    completions, scores = read.columns["completions"], read.columns["scores"]
    if not isinstance(completions, list) or not isinstance(scores, list) or len(completions) != len(scores):
        raise UsageError(f"completions and scores are lists, as long as each other, and not {shown(scores)}")
    graded = [(score, answer) for score, answer in zip(scores, completions, strict=True) if is_grade(score)]
    if not graded or min(graded, key=grade)[0] == max(graded, key=grade)[0]:
        raise UnfitError("whose answers all have the same score")
    return [content(choose(graded, key=grade)[1]) for choose in (max, min)]


def grade(graded: tuple[float, Any]) -> float:
    return graded[0]


def is_grade(score: Any) -> bool:
    """Whether it is a number, by which answers can be put in order."""
    return isinstance(score, int | float) and not math.isnan(score)


class ScoredAnswers(Demonstrations):
    """Pairs in the words of a sequence classifier, which knows no limit between prompt and answer."""

    def sample(self, prompt: Prompt, answer: str, reward: float) -> Sample:
        """An answer, and one token more: what would be predicted where its score is read."""
        turns = answer if isinstance(prompt.text, str) else [{"role": "assistant", "content": answer}]
        ids = list(conversation_ids(self.tokenizer, prompt.text, turns)["input_ids"])
        end: Any = self.tokenizer.pad_token_id  # transformers reads the last token that is none of these
        while ids and ids[-1] == end:
            ids.pop()
        common = min(agreement(ids, prompt.ids), len(ids) - 1)
        own = ids[common:]
        limit = self.config.max_completion_length
        asked = prompt if common == len(prompt.ids) else replace(prompt, ids=ids[:common])
        return Sample(asked, [*own[:limit], end], [], len(own) <= limit, answer, reward=reward)
