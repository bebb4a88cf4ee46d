"""ReMax's options."""

from __future__ import annotations

from nanorlhf.config.option import config, option
from nanorlhf.config.training import PolicyGradientConfig


@config
class ReMaxConfig(PolicyGradientConfig):
    """ReMax: one sampled answer to each prompt, judged against the greedy one."""

    num_generations: int = option(
        1, "Completions for each prompt, beside the greedy one.", "rollout", first=True, above=0
    )
    kl_coef: float = option(0.01, "Weight of the KL from the starting policy.", "training", first=True, least=0)

    def validate(self) -> None:
        super().validate()
        self.require(
            self.temperature >= 0.1,
            "temperature",
            "near 0 sampling is greedy, and nothing is left to compare; at least 0.1",
        )
