"""GRPO (arXiv:2402.03300): the group's mean is the baseline, its spread the scale, KL a term of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from nanorlhf.advantages import group_standardise, has_spread
from nanorlhf.algorithm import Algorithm, Loss, Measure
from nanorlhf.grpo.config import GRPOConfig
from nanorlhf.losses import k3
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, MicroBatch, Rollout


class GRPO(Algorithm):
    """Group-relative policy optimisation."""

    name = "grpo"
    config: GRPOConfig

    @property
    def needs(self) -> set[Measure]:
        return {"ref_logprobs"} if self.config.kl_coef else set()

    def drop(self, rollout: Rollout) -> Tensor:
        """A group without spread has no gradient, unless the KL term gives it one."""
        spread = has_spread(rollout.rewards, rollout.group)
        return torch.zeros_like(spread) if self.config.kl_coef else ~spread

    def credit(self, rollout: Rollout) -> Credit:
        advantages = group_standardise(rollout.rewards, rollout.group, self.config.scale_rewards)
        return Credit(advantages[rollout.sample], keep=~rollout.rewards.isnan())

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Loss:
        loss = super().loss(logprobs, entropy, batch)
        if self.config.kl_coef:
            kl = k3(logprobs, batch.columns["ref_logprobs"])
            loss.tokens = loss.tokens + self.config.kl_coef * kl
            loss.stats["kl"] = kl.detach()
        return loss


class GRPOTrainer(Trainer):
    """Trains by GRPO; the arguments are those that TRL's users know."""

    algorithm_class = GRPO
    config_class = GRPOConfig
