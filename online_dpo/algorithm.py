"""Online DPO (arXiv:2402.04792): DPO on the policy's own answers, the best of a group against its worst."""

from __future__ import annotations

import torch
from torch import Tensor

from nanorlhf.algorithm import Loss, OnPolicy
from nanorlhf.formulas import losses
from nanorlhf.formulas.advantages import best_of_group
from nanorlhf.formulas.kl import as_loss
from nanorlhf.online_dpo.config import OnlineDPOConfig
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, MicroBatch, Rollout


class OnlineDPO(OnPolicy):
    """Online direct preference optimisation."""

    name = "online_dpo"
    together = 2
    config: OnlineDPOConfig

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"ref_logprobs"}

    def verdict(self, rollout: Rollout) -> Tensor:
        """(S,) 1 for the best of a group, -1 for its worst, 0 for others, ties and groups that were hardly scored."""
        scores = self.counted_scores(rollout)
        return best_of_group(scores, rollout.group).float() - best_of_group(-scores, rollout.group).float()

    def drop(self, rollout: Rollout) -> Tensor:
        """Drops the samples in no pair, unless the KL has still to be measured to pick the pair."""
        verdict = self.verdict(rollout) if not self.config.kl_coef else torch.ones(len(rollout.samples))
        return verdict == 0

    def credit(self, rollout: Rollout) -> Credit:
        verdict = self.verdict(rollout)
        return Credit(verdict[rollout.sample], keep=verdict != 0)

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Loss:
        gap = logprobs - batch.columns["ref_logprobs"]
        tokens, stats = losses.preference(gap, batch.columns["advantages"], batch.group, self.config.beta)
        kl = as_loss("k1", gap, logprobs - batch.columns["old_logprobs"])  # only to be logged: beta stands for it
        return Loss(tokens, stats | {"kl": kl.detach()})


class OnlineDPOTrainer(Trainer):
    """Trains by Online DPO; the arguments are those that TRL's users know."""

    algorithm_class = OnlineDPO
    config_class = OnlineDPOConfig
