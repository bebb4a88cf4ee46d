"""RAFT (arXiv:2304.06767): the best answer of a group is a demonstration, the others are forgotten."""

from __future__ import annotations

import torch
from torch import Tensor

from nanorlhf.algorithm import Loss, OnPolicy
from nanorlhf.formulas.advantages import best_of_group
from nanorlhf.raft.config import RAFTConfig
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, MicroBatch, Rollout


class RAFT(OnPolicy):
    """Reward-ranked fine-tuning."""

    name = "raft"
    config: RAFTConfig

    def credit(self, rollout: Rollout) -> Credit:
        best = best_of_group(self.counted_scores(rollout), rollout.group)
        return Credit(torch.ones(int(rollout.lengths.sum())), keep=best)

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Loss:
        return Loss(-logprobs)


class RAFTTrainer(Trainer):
    """Trains by RAFT; the arguments are those that TRL's users know."""

    algorithm_class = RAFT
    config_class = RAFTConfig
