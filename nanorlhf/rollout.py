"""Prompts to scored samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanorlhf.advantages import has_spread
from nanorlhf.algorithm import Plan
from nanorlhf.data import Prompts
from nanorlhf.engines.base import Completion, Engine, Request, Sampling
from nanorlhf.metrics import Clock
from nanorlhf.options import OnPolicyConfig
from nanorlhf.scoring import Reward, score
from nanorlhf.seeds import derive
from nanorlhf.types import Prompt, Rollout, Sample

Progress = Callable[[int], None]  # told how many tokens have just arrived


class Source(Protocol):
    """Where a step's samples come from."""

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """The samples of step `step`, counted from 1; the same ones each time it is asked."""
        ...


class Sampler:
    """The policy's own samples: written by the engine, scored by the rewards."""

    def __init__(
        self,
        config: OnPolicyConfig,
        plan: Plan,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        rewards: Sequence[Reward],
    ) -> None:
        self.config, self.plan, self.engine = config, plan, engine
        self.tokenizer, self.prompts, self.rewards = tokenizer, prompts, rewards

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """A step's samples; groups without spread are replaced for some rounds, where that is asked for."""
        size = self.config.prompts_per_step
        rollout = self.sample(self.prompts.batch(step - 1, size), ("step", step), clock, progress)
        for attempt in range(self.config.dynamic_sampling):
            teaching = has_spread(rollout.rewards, rollout.group)
            wanting = size - len(rollout.group[teaching].unique())
            if not wanting:
                break
            fresh = self.sample(self.prompts.beside(wanting, step, attempt), ("refill", step, attempt), clock, progress)
            rollout = refilled(rollout, fresh)
        return rollout

    def sample(
        self, prompts: Sequence[Prompt], what: tuple[str | int, ...], clock: Clock, progress: Progress
    ) -> Rollout:
        """Samples for these prompts, with the occasion's seed; the engine's log-probabilities are the first column."""
        seed, each = derive(self.config.seed, *what), self.plan.samples
        with clock("rollout"):
            samples, greedy = write(self.engine, self.tokenizer, prompts, self.plan, seed, progress=progress)
        with clock("reward"):
            score(self.rewards, [*samples, *greedy])
            if self.config.overlong_buffer:
                punish_overlong(samples, self.config.max_completion_length, self.config.overlong_buffer)
        return Rollout(
            samples=samples,
            group=torch.arange(len(prompts)).repeat_interleave(each),
            rewards=as_tensor(samples),
            written=sum(len(s.completion_ids) for s in [*samples, *greedy]),
            baselines=as_tensor(greedy).repeat_interleave(each) if greedy else None,
            columns={"engine_logprobs": torch.tensor([x for s in samples for x in s.engine_logprobs])},
        )


def write(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    plan: Plan,
    seed: int,
    sampling: Sampling | None = None,
    progress: Progress = lambda tokens: None,
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
    return Sample(prompt, completion.token_ids, completion.logprobs, completion.stopped, prompt.prefill + str(text))


def as_tensor(samples: Sequence[Sample]) -> Tensor:
    """(S,) rewards, NaN where there is none."""
    return torch.tensor([float("nan") if s.reward is None else s.reward for s in samples])


def punish_overlong(samples: Sequence[Sample], limit: int, buffer: int) -> None:
    """DAPO's soft punishment (arXiv:2503.14476): from 0 where the last `buffer` tokens begin to -1 at the limit."""
    for s in samples:
        excess = max(0, len(s.completion_ids) - (limit - buffer))
        if s.reward is not None:
            s.reward -= excess / buffer


def refilled(rollout: Rollout, fresh: Rollout) -> Rollout:
    """As many groups as before: those with spread from both, then as many of the others as are wanting."""
    groups = int(rollout.group.max()) + 1
    both = rollout.followed_by(fresh)
    teaching = has_spread(both.rewards, both.group)
    order = sorted(range(int(both.group.max()) + 1), key=lambda g: (not teaching[both.group == g].any(), g))
    return both.groups(order[:groups])
