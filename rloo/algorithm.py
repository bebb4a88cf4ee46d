"""RLOO (arXiv:2402.14740): the mean of the others is the baseline, and a sequence is one action."""

from __future__ import annotations

from nanorlhf.algorithm import PolicyGradient
from nanorlhf.formulas.advantages import leave_one_out
from nanorlhf.rloo.config import RLOOConfig
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, Rollout


class RLOO(PolicyGradient):
    """REINFORCE leave-one-out."""

    name = "rloo"
    config: RLOOConfig

    def credit(self, rollout: Rollout) -> Credit:
        advantages = leave_one_out(self.scores(rollout), rollout.group)
        return Credit(advantages[rollout.sample], keep=self.counted(rollout))


class RLOOTrainer(Trainer):
    """Trains by RLOO; the arguments are those that TRL's users know."""

    algorithm_class = RLOO
    config_class = RLOOConfig
