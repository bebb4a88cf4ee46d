"""PPO's options."""

from __future__ import annotations

from nanorlhf.config.option import config, option
from nanorlhf.config.training import CriticConfig


@config
class PPOConfig(CriticConfig):
    """Proximal policy optimisation: a critic says what to expect at every token, and surprise is the advantage."""

    num_generations: int = option(1, "Completions for each prompt.", "rollout", first=True, above=0)
    kl_coef: float = option(0.05, "Weight of the KL from the starting policy.", "training", first=True, least=0)
