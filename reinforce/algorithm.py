"""REINFORCE (Williams 1992), REINFORCE++ (arXiv:2501.03262): the reward to come, less a baseline, or whitened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanorlhf.algorithm import PolicyGradient, Samples
from nanorlhf.formulas.advantages import group_stats
from nanorlhf.reinforce.config import REINFORCEConfig
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, Rollout


class REINFORCE(PolicyGradient):
    """The plain policy gradient."""

    name = "reinforce"
    config: REINFORCEConfig

    def __init__(self, config: REINFORCEConfig) -> None:
        super().__init__(config)
        self.average = self.mean = 0.0

    @property
    def has_baseline(self) -> bool:
        return self.config.baseline not in ("none", "group")  # REINFORCE++ whitens after the group's mean, too

    def samples(self) -> Samples:
        return Samples(self.config.num_generations, greedy=self.config.baseline == "greedy")

    def credit(self, rollout: Rollout) -> Credit:
        baselines = self.baselines(rollout)
        keep = self.counted(rollout) & ~baselines.isnan()
        return Credit(self.returns(rollout) - baselines.nan_to_num(0.0)[rollout.sample], keep)

    def baselines(self, rollout: Rollout) -> Tensor:
        """(S,) what to expect of each sample."""
        kind, rewards = self.config.baseline, rollout.rewards
        self.mean = float(rewards.double().nanmean().nan_to_num(self.average))  # exact if all earned the same
        expected = {"none": 0.0, "mean": self.mean, "ema": self.average}
        if kind in expected:
            return torch.full_like(rewards, expected[kind])
        if kind == "group":
            return group_stats(rewards, rollout.group)[1].float()
        assert rollout.baselines is not None, "it asks for greedy samples"
        return rollout.baselines

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """The moving average takes the step's batch in, once that is trained on."""
        super().observe(metrics)
        self.average = self.config.ema_beta * self.average + (1 - self.config.ema_beta) * self.mean

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.average = state["average"]


class REINFORCETrainer(Trainer):
    """Trains by REINFORCE; the arguments are those that TRL's users know."""

    algorithm_class = REINFORCE
    config_class = REINFORCEConfig
