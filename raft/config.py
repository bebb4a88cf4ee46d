"""RAFT's options."""

from __future__ import annotations

from nanorlhf.config.option import config
from nanorlhf.config.training import OnPolicyConfig


@config
class RAFTConfig(OnPolicyConfig):
    """Reward-ranked fine-tuning: many answers to each prompt, the best one learned as a demonstration."""

    def validate(self) -> None:
        super().validate()
        self.require(
            self.num_generations >= 2, "num_generations", "RAFT picks the best of several answers, so at least 2"
        )
        self.require(
            self.kl_in == "reward", "kl_in", "RAFT takes the KL into the score that picks the best; use reward"
        )
