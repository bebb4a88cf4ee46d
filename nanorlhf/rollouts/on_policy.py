"""Rollouts that the policy of now writes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from nanorlhf.algorithm import Samples
from nanorlhf.config.training import OnPolicyConfig
from nanorlhf.data.prompts import Prompts
from nanorlhf.formulas.advantages import has_spread
from nanorlhf.records.metrics import Clock
from nanorlhf.rollouts.dapo import punish_overlong, refilled
from nanorlhf.rollouts.sampler import Sampler
from nanorlhf.rollouts.source import Source, shared
from nanorlhf.system.seeds import derive
from nanorlhf.types import Progress, Prompt, Rollout, Sample, as_tensor


class OnPolicySource(Source):
    """The policy's own samples of a step."""

    def __init__(self, config: OnPolicyConfig, wanted: Samples, sampler: Sampler, prompts: Prompts) -> None:
        self.config, self.wanted, self.sampler, self.prompts = config, wanted, sampler, prompts

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """A step's samples; groups without spread are replaced for some rounds, if that is asked for."""
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

    def beforehand(self, count: int, progress: Progress) -> Rollout:
        """The starting policy's samples for prompts of a choice of its own, before the first step."""
        draw = random.Random(derive(self.config.seed, "value_init"))
        return self.sample(self.prompts.sample(count, draw), ("value_init",), Clock(), progress)

    def sample(
        self, prompts: Sequence[Prompt], what: tuple[str | int, ...], clock: Clock, progress: Progress
    ) -> Rollout:
        """Samples for these prompts, with the occasion's seed."""
        with clock("rollout"):
            seed = derive(self.config.seed, *what)
            samples, greedy = self.sampler.write(prompts, self.wanted, seed, progress=progress)
        return self.scored(samples, greedy, clock)

    def scored(self, samples: list[Sample], greedy: list[Sample], clock: Clock) -> Rollout:
        """The rollout of samples that are written; the engine's log-probabilities are its first column."""
        with clock("reward"):
            self.sampler.scorer.finish([*samples, *greedy])
            punish_overlong(samples, self.config.max_completion_length, self.config.overlong_buffer)
            samples, greedy = shared(samples), shared(greedy)
        return Rollout(
            samples=samples,
            group=torch.arange(len(samples)) // self.wanted.each,
            rewards=as_tensor(samples),
            written=sum(s.trained for s in [*samples, *greedy]),
            scored=len(samples) + len(greedy),
            baselines=as_tensor(greedy).repeat_interleave(self.wanted.each) if greedy else None,
            columns={"engine_logprobs": torch.tensor([x for s in samples for x in s.engine_logprobs])},
        )
