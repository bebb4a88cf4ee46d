"""Online DPO's options."""

from __future__ import annotations

from nanorlhf.config.option import config, option
from nanorlhf.config.training import Norm, OnPolicyConfig


@config
class OnlineDPOConfig(OnPolicyConfig):
    """Online direct preference optimisation: the best and the worst of the policy's own answers make a pair."""

    num_generations: int = option(
        2, "Completions for each prompt, of which the best and the worst make a pair.", "rollout", first=True, least=2
    )
    beta: float = option(
        0.1,
        "How dear it is to leave the reference: the weight of the KL that DPO implies.",
        "training",
        first=True,
        above=0,
    )
    norm: Norm = option(
        "sequence", "What a pair weighs: sequence, the same; token and constant, its length.", "training"
    )

    @property
    def has_reference(self) -> bool:
        return True

    def validate(self) -> None:
        super().validate()
        self.require(
            self.kl_in == "reward",
            "kl_in",
            "beta is the KL in the loss; kl_coef counts where the pair is picked, so use reward",
        )
