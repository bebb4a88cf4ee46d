"""GRPO (arXiv:2402.03300): the group's mean is the baseline, its spread the scale."""

from __future__ import annotations

import torch
from torch import Tensor

from nanorlhf.algorithm import PolicyGradient
from nanorlhf.formulas.advantages import gpg, group_standardise, has_spread, maxrl, opo
from nanorlhf.grpo.config import GRPOConfig
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, Rollout


class GRPO(PolicyGradient):
    """Group-relative policy optimisation."""

    name = "grpo"
    config: GRPOConfig

    def drop(self, rollout: Rollout) -> Tensor:
        """A group without spread has no gradient, unless a KL or entropy term or whitening gives it one."""
        spread, config = has_spread(rollout.rewards, rollout.group), self.config
        moved = config.kl_coef or config.entropy_coef or config.whiten_advantages == "on"
        return torch.zeros_like(spread) if moved else ~spread

    def credit(self, rollout: Rollout) -> Credit:
        scores, group = self.scores(rollout), rollout.group
        if self.config.advantage == "group":
            advantages = group_standardise(scores, group, self.config.scale_rewards)
        elif self.config.advantage == "opo":
            advantages = opo(scores, group, rollout.lengths)
        else:
            advantages = {"maxrl": maxrl, "gpg": gpg}[self.config.advantage](scores, group)
        return Credit(advantages[rollout.sample], keep=self.counted(rollout))


class GRPOTrainer(Trainer):
    """Trains by GRPO; the arguments are those that TRL's users know."""

    algorithm_class = GRPO
    config_class = GRPOConfig
