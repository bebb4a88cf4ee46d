"""RLOO's options."""

from __future__ import annotations

from typing import Literal

from nanorlhf.config.option import config, option
from nanorlhf.config.training import Norm, PolicyGradientConfig


@config
class RLOOConfig(PolicyGradientConfig):
    """REINFORCE leave-one-out: many answers to each prompt, each judged against the mean of the others."""

    kl_coef: float = option(0.05, "Weight of the KL from the starting policy.", "training", first=True, least=0)
    norm: Norm = option(
        "sequence", "What a token weighs: token 1/N, sequence 1/(S len), constant 1/(S limit).", "training"
    )
    policy_loss: Literal["clipped", "sequence", "gspo", "cispo", "sapo"] = option(
        "sequence",
        "One ratio for a sequence, the product of its tokens'; the others as in GRPO.",
        "training",
        first=True,
    )

    def validate(self) -> None:
        super().validate()
        self.require(
            self.num_generations >= 2, "num_generations", "RLOO leaves one answer out of several, so at least 2"
        )
