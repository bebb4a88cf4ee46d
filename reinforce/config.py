"""REINFORCE's options."""

from __future__ import annotations

from typing import Literal

from nanorlhf.config.option import config, option
from nanorlhf.config.training import PolicyGradientConfig


@config
class REINFORCEConfig(PolicyGradientConfig):
    """REINFORCE: every token is weighed by the reward still to come, less a baseline."""

    num_generations: int = option(1, "Completions for each prompt.", "rollout", first=True, above=0)
    kl_coef: float = option(0.01, "Weight of the KL from the starting policy.", "training", first=True, least=0)
    baseline: Literal["none", "mean", "ema", "greedy", "group"] = option(
        "none",
        "none (advantages are whitened), mean of the batch, ema of those means, greedy answer (scst), or group mean.",
        "training",
        first=True,
    )
    ema_beta: float = option(0.9, "How much of the moving average stays at each step.", "training", least=0, below=1)

    def validate(self) -> None:
        super().validate()
        several = self.baseline != "group" or self.num_generations >= 2
        self.require(several, "num_generations", "the group's mean is a baseline for 2 answers or more")
        warm = self.baseline != "greedy" or self.temperature >= 0.1
        self.require(warm, "temperature", "near 0 sampling is greedy, and nothing is left to compare; at least 0.1")
