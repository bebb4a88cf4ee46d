"""GRPO's options."""

from __future__ import annotations

from typing import Literal

from nanorlhf.config import TrainConfig, config, option


@config
class GRPOConfig(TrainConfig):
    """Group-relative policy optimisation: many answers to each prompt, each judged against the others."""

    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "Divide advantages by the std of the group, of the batch, or by nothing.", "training"
    )

    def validate(self) -> None:
        super().validate()
        self.require(
            self.num_generations >= 2, "num_generations", "GRPO compares answers to the same prompt, so at least 2"
        )
