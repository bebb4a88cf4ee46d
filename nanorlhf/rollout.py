"""Prompts to scored samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from nanorlhf.algorithm import Plan
from nanorlhf.engines.base import Completion, Engine, Request, Sampling
from nanorlhf.metrics import Clock
from nanorlhf.scoring import Reward, score
from nanorlhf.types import Prompt, Rollout, Sample


def write(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    plan: Plan,
    seed: int,
    sampling: Sampling | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Sample], list[Sample]]:
    """The engine's completions in the order of the prompts, and each prompt's greedy one where planned."""
    each = plan.samples
    asked = [Request(p * each + g, prompt.ids) for p, prompt in enumerate(prompts) for g in range(each)]
    greedy = [Request(len(asked) + p, prompt.ids, greedy=True) for p, prompt in enumerate(prompts) if plan.greedy]
    owners = [prompt for prompt in prompts for _ in range(each)] + (list(prompts) if plan.greedy else [])
    done: list[Sample | None] = [None] * len(owners)
    for completion in engine.generate([*asked, *greedy], seed, sampling):
        done[completion.id] = as_sample(owners[completion.id], completion, tokenizer)
        progress(len(completion.token_ids))
    samples = [s for s in done if s is not None]
    assert len(samples) == len(owners), "the engine must finish every request"
    return samples[: len(asked)], samples[len(asked) :]


def as_sample(prompt: Prompt, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """A completion with its text, end tokens left out."""
    text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    return Sample(prompt, completion.token_ids, completion.logprobs, completion.stopped, str(text))


def collect(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    plan: Plan,
    rewards: Sequence[Reward],
    seed: int,
    clock: Clock,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Rollout:
    """A step's rollout: written, scored, and the engine's log-probabilities as its first column."""
    with clock("rollout"):
        samples, greedy = write(engine, tokenizer, prompts, plan, seed, progress=progress)
    with clock("reward"):
        score(rewards, [*samples, *greedy])
    return Rollout(
        samples=samples,
        group=torch.repeat_interleave(torch.arange(len(prompts)), plan.samples),
        rewards=as_tensor(samples),
        baselines=torch.repeat_interleave(as_tensor(greedy), plan.samples) if greedy else None,
        columns={"engine_logprobs": torch.tensor([x for s in samples for x in s.engine_logprobs])},
    )


def as_tensor(samples: Sequence[Sample]) -> torch.Tensor:
    """(S,) rewards, NaN where there is none."""
    return torch.tensor([float("nan") if s.reward is None else s.reward for s in samples])
