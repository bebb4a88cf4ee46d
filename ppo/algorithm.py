"""PPO (arXiv:1707.06347, arXiv:2203.02155): token-level GAE over a critic's values, the KL in the reward."""

from __future__ import annotations

from nanorlhf.algorithm import PolicyGradient
from nanorlhf.formulas.advantages import gae
from nanorlhf.ppo.config import PPOConfig
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, Rollout


class PPO(PolicyGradient):
    """Proximal policy optimisation."""

    name = "ppo"
    config: PPOConfig

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"values"}

    def credit(self, rollout: Rollout) -> Credit:
        rewards, values = self.token_rewards(rollout), rollout.columns["values"]
        advantages, returns = gae(rewards, values, rollout.lengths, self.config.gamma, self.config.lam)
        return Credit(advantages, self.counted(rollout), returns)


class PPOTrainer(Trainer):
    """Trains by PPO; the arguments are those that TRL's users know."""

    algorithm_class = PPO
    config_class = PPOConfig
