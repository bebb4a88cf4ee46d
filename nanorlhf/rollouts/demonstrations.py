"""Steps made of a dataset's own answers: demonstrations, or pairs of a better and a worse one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from nanorlhf.config.training import TrainConfig
from nanorlhf.data.prompts import ANSWERS, Prompts
from nanorlhf.data.row_schemas import UnfitError, content
from nanorlhf.data.row_to_prompt import ReadRow
from nanorlhf.data.templates import answer_ids
from nanorlhf.errors import UsageError
from nanorlhf.records.metrics import Clock
from nanorlhf.rollouts.source import Source
from nanorlhf.types import Progress, Prompt, Rollout, Sample, as_tensor


def demonstration(read: ReadRow) -> list[str]:
    """The answer to copy: the completion, or of a pair the chosen answer."""
    for name in ("completion", "chosen"):
        if name in read.answers:
            return [content(read.answers[name])]
    raise UsageError(f"demonstrations have the columns 'prompt' and 'completion', or 'messages'; {columns(read)}")


def preference(read: ReadRow) -> list[str]:
    """A pair: what was chosen and what was rejected."""
    if not {"chosen", "rejected"} <= read.answers.keys():
        raise UsageError(f"preferences have the columns 'chosen' and 'rejected', and mostly 'prompt'; {columns(read)}")
    if read.answers["rejected"] is None:
        raise UnfitError("with a pair that differs before its last turn")
    return [content(read.answers["chosen"]), content(read.answers["rejected"])]


def columns(read: ReadRow) -> str:
    return f"this dataset has {', '.join(read.names)}"


class Demonstrations(Source):
    """A step's samples from the dataset: those of one prompt adjacent, the first with reward 1, another with 0."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        held_out: Sequence[Prompt],
        ends: Sequence[int],
    ) -> None:
        self.config, self.tokenizer, self.prompts, self.ends = config, tokenizer, prompts, ends
        self.held_out = self.of(held_out) if held_out else None

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """The samples of a step's rows."""
        with clock("rollout"):
            return self.of(self.prompts.batch(step - 1, self.config.prompts_per_step))

    def of(self, prompts: Sequence[Prompt]) -> Rollout:
        """The samples of these rows."""
        samples = [
            self.sample(prompt, answer, reward)
            for prompt in prompts
            for answer, reward in zip(prompt.columns[ANSWERS], (1.0, 0.0), strict=False)
        ]
        group = torch.arange(len(prompts)).repeat_interleave(len(samples) // len(prompts))
        return Rollout(samples, group, as_tensor(samples))

    def sample(self, prompt: Prompt, answer: str, reward: float) -> Sample:
        """An answer as if the policy had written it, cut off at the same limit."""
        ids = answer_ids(prompt, answer, self.tokenizer, self.ends, self.config.chat_template_kwargs)
        limit = self.config.max_completion_length
        return Sample(prompt, ids[:limit], [], len(ids) <= limit, answer, reward=reward)
