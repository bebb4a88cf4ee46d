"""SFT: every token of a demonstration becomes more probable, its end token too."""

from __future__ import annotations

import torch
from torch import Tensor

from nanorlhf.algorithm import Algorithm, Loss
from nanorlhf.rollouts.demonstrations import demonstration
from nanorlhf.sft.config import SFTConfig
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, MicroBatch, Rollout


class SFT(Algorithm):
    """Supervised fine-tuning."""

    name = "sft"

    def credit(self, rollout: Rollout) -> Credit:
        keep = torch.ones(len(rollout.samples), dtype=torch.bool)
        return Credit(torch.ones(int(rollout.lengths.sum())), keep)

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Loss:
        return Loss(-logprobs)


class SFTTrainer(Trainer):
    """Trains by SFT; the arguments are those that TRL's users know."""

    algorithm_class = SFT
    config_class = SFTConfig
    reader = staticmethod(demonstration)
