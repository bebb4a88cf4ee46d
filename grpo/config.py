"""GRPO's options."""

from __future__ import annotations

from typing import Literal

from nanorlhf.config.option import config, option
from nanorlhf.config.training import PolicyGradientConfig


@config
class GRPOConfig(PolicyGradientConfig):
    """Group-relative policy optimisation: many answers to each prompt, each judged against the others."""

    kl_in: Literal["reward", "loss"] = option("loss", "Where the KL enters.", "training")
    kl_estimator: Literal["k1", "k2", "k3"] = option("k3", "How it is estimated from each token.", "training")
    advantage: Literal["group", "opo", "maxrl", "gpg"] = option(
        "group",
        "group: minus the mean, over the std; opo: minus the length-weighted mean; maxrl: over the mean; gpg.",
        "training",
        first=True,
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "Divide group advantages by the std of the group, of the batch, or by nothing.", "training", first=True
    )

    def validate(self) -> None:
        super().validate()
        self.require(
            self.num_generations >= 2, "num_generations", "GRPO compares answers to the same prompt, so at least 2"
        )
