"""Steps made of a dataset's own answers: demonstrations, or pairs of a better and a worse one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from nanorlhf.data import Prompts
from nanorlhf.errors import UsageError
from nanorlhf.loop import Loop
from nanorlhf.metrics import Averages, Clock
from nanorlhf.options import TrainConfig
from nanorlhf.rollout import Progress, as_tensor
from nanorlhf.types import Prompt, Rollout, Sample, Text

Row = Mapping[str, Any]
ANSWERS = "demonstrations"  # the column that `read` adds


class Reader(Protocol):
    """How rows of one kind are read."""

    def __call__(self, row: Row, prompt: str) -> tuple[Text, list[str]]:
        """The prompt, which mostly lies in the column `prompt`, and its answers, the best first."""
        ...


def demonstration(row: Row, prompt: str) -> tuple[Text, list[str]]:
    """A prompt and its completion, or a conversation (`messages`) whose last turn is the completion."""
    if prompt in row and "completion" in row:
        return row[prompt], [content(row["completion"])]
    if "messages" in row:
        return row["messages"][:-1], [content(row["messages"][-1:])]
    raise UsageError(f"demonstrations have the columns {prompt!r} and 'completion', or 'messages'; {columns(row)}")


def preference(row: Row, prompt: str) -> tuple[Text, list[str]]:
    """A prompt with what was chosen and what was rejected; without one of their kind, it is what both begin with."""
    if not {"chosen", "rejected"} <= row.keys():
        raise UsageError(f"preferences have the columns 'chosen' and 'rejected', and mostly {prompt!r}; {columns(row)}")
    chosen, rejected = row["chosen"], row["rejected"]
    if prompt in row and (isinstance(chosen, str) or not isinstance(row[prompt], str)):
        return row[prompt], [content(chosen), content(rejected)]
    common = min(len(chosen), len(rejected))
    common = next((i for i in range(common) if chosen[i] != rejected[i]), common)
    if isinstance(chosen, str):  # words stay whole, and a space belongs to what follows it
        common = len(re.sub(r" ?\w*\Z", "", chosen[:common]))
    else:
        common = min(common, len(chosen) - 1, len(rejected) - 1)
    if not chosen[:common]:
        raise UsageError(f"without {prompt!r}, 'chosen' and 'rejected' must begin alike: {str(chosen)[:200]!r}")
    return chosen[:common], [content(chosen[common:]), content(rejected[common:])]


def content(answer: Text) -> str:
    """The text of an answer, which is plain or one message of the assistant's."""
    if isinstance(answer, str):
        return answer
    if [m["role"] for m in answer] != ["assistant"]:
        raise UsageError(f"a completion is text or one message of the assistant's, and not {str(answer)[:200]}")
    return answer[0]["content"]


def columns(row: Row) -> str:
    return f"this dataset has {', '.join(row)}"


def read(dataset: datasets.Dataset, reader: Reader, prompt: str) -> datasets.Dataset:
    """The dataset with its prompts in the column `prompt` and its answers beside them."""
    found = [reader(row, prompt) for row in cast(Iterable[Row], dataset)]
    others = dataset.remove_columns([name for name in (prompt, ANSWERS) if name in dataset.column_names])
    answered = others.add_column(ANSWERS, [answers for _, answers in found])  # type: ignore[call-arg]
    return answered.add_column(prompt, [text for text, _ in found])  # type: ignore[call-arg]


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
        ids, limit = answer_ids(prompt.text, answer, self.tokenizer, self.ends), self.config.max_completion_length
        return Sample(prompt, ids[:limit], [], len(ids) <= limit, answer, reward=reward)


@torch.no_grad()
def judged(loop: Loop, rollout: Rollout) -> dict[str, float | None]:
    """The loss, and what it says of itself, on answers that were never trained on; measures them the first time."""
    everything = torch.ones(len(rollout.samples), dtype=torch.bool)
    if not rollout.columns:
        loop.measure(rollout, everything)
    averages, total = Averages(), 0.0
    for batch in loop.batches(rollout, loop.algorithm.credit(rollout), everything, everything):
        here = batch.to(loop.policy.device)
        loss = loop.algorithm.loss(*loop.policy.logprobs(here), here)
        total += (here.weights * loss.tokens).sum().item()
        for name, values in loss.stats.items():
            averages.add(name, values)
    return {"eval/loss": total} | {f"eval/{name}": mean for name, mean in averages.metrics(()).items()}


def answer_ids(prompt: Text, answer: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int]:
    """The tokens that follow the prompt's, with the end token that the chat template gives, or else the tokenizer's."""
    text = answer
    if not isinstance(prompt, str):
        opened = str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
        whole = str(tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False))
        text = whole.removeprefix(opened) if whole.startswith(opened) else answer
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    last = max((place for place, token in enumerate(ids) if token in ends), default=None)
    if last is not None:
        return ids[: last + 1]
    return ids + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else list(ends[:1]))
