"""Steps made of a dataset's own answers: demonstrations, or pairs of a better and a worse one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nanorlhf.chat import render
from nanorlhf.data import ANSWERS, Prompts
from nanorlhf.errors import UsageError
from nanorlhf.loop import Loop
from nanorlhf.metrics import Averages, Clock
from nanorlhf.options import TrainConfig
from nanorlhf.reading import Read
from nanorlhf.rollout import Progress, as_tensor
from nanorlhf.rows import UnfitError, content
from nanorlhf.team import team
from nanorlhf.types import Prompt, Rollout, Sample


def demonstration(read: Read) -> list[str]:
    """What there is to copy: the completion, or of a pair the chosen answer."""
    for name in ("completion", "chosen"):
        if name in read.answers:
            return [content(read.answers[name])]
    raise UsageError(f"demonstrations have the columns 'prompt' and 'completion', or 'messages'; {columns(read)}")


def preference(read: Read) -> list[str]:
    """A pair: what was chosen and what was rejected."""
    if not {"chosen", "rejected"} <= read.answers.keys():
        raise UsageError(f"preferences have the columns 'chosen' and 'rejected', and mostly 'prompt'; {columns(read)}")
    if read.answers["rejected"] is None:
        raise UnfitError("with a pair that differs before its last turn")
    return [content(read.answers["chosen"]), content(read.answers["rejected"])]


def columns(read: Read) -> str:
    return f"this dataset has {', '.join(read.names)}"


class Demonstrations:
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


@torch.no_grad()
def judged(loop: Loop, rollout: Rollout) -> dict[str, float | None]:
    """The loss, and what it says of itself, on answers that were never trained on; measures them the first time."""
    everything = torch.ones(len(rollout.samples), dtype=torch.bool)
    if not rollout.columns:
        loop.measure(rollout, everything)

    def judge() -> dict[str, float | None]:
        averages, total = Averages(), 0.0
        for batch in loop.batches(rollout, loop.algorithm.credit(rollout), everything, everything):
            here = batch.to(loop.policy.device)
            logprobs, entropy = loop.policy.logprobs(here)
            if not len(here.targets):
                continue
            loss = loop.algorithm.loss(logprobs, entropy, here)
            total += (here.weights * loss.tokens).sum().item()
            for name, values in loss.stats.items():
                averages.add(name, values)
        loss = torch.tensor([total], dtype=torch.double)
        team().add_up([loss])
        averages = averages.joined()
        return {"eval/loss": loss.item()} | {f"eval/{name}": mean for name, mean in averages.metrics(()).items()}

    return loop.fit("evaluation", rollout, everything, judge, loop.algorithm.together)


def answer_ids(
    prompt: Prompt, answer: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], options: Mapping[str, Any]
) -> list[int]:
    """The tokens that follow the prompt's, with the end token that the chat template gives, or else the tokenizer's."""
    text = answer.removeprefix(prompt.prefill)
    if not isinstance(prompt.text, str):
        opened = render(tokenizer, prompt.text, options, opens=True)
        whole = render(tokenizer, [*prompt.text, {"role": "assistant", "content": answer}], options)
        rest = whole.removeprefix(opened)
        again = text != answer  # the thought is open already, and the template may open it twice
        if whole.startswith(opened) and text.strip() in rest and not again:
            text = rest
        elif text.strip() and text.strip() in whole:  # else the template drops thoughts
            text += whole.rpartition(text.strip())[2]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    last = max((place for place, token in enumerate(ids) if token in ends), default=None)
    if last is not None:
        return ids[: last + 1]
    return ids + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else list(ends[:1]))
