"""DPO (arXiv:2305.18290): the chosen answer gains on the rejected one, as seen from the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from nanorlhf.algorithm import Algorithm, Loss
from nanorlhf.dpo.config import DPOConfig
from nanorlhf.formulas import losses
from nanorlhf.rollouts.demonstrations import preference
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, MicroBatch, Rollout


class DPO(Algorithm):
    """Direct preference optimisation."""

    name = "dpo"
    together = 2
    norm = "sequence"  # with the same loss at every token of a pair, the mean over pairs
    config: DPOConfig

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logprobs"})

    def credit(self, rollout: Rollout) -> Credit:
        """1 for what was chosen, -1 for what was rejected."""
        keep = torch.ones(len(rollout.samples), dtype=torch.bool)
        return Credit((2 * rollout.rewards - 1)[rollout.sample], keep)

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Loss:
        gap = logprobs - batch.columns["ref_logprobs"]
        return Loss(*losses.preference(gap, batch.columns["advantages"], batch.group, self.config.beta))


class DPOTrainer(Trainer):
    """Trains by DPO; the arguments are those that TRL's users know."""

    algorithm_class = DPO
    config_class = DPOConfig
    reader = staticmethod(preference)
