"""SFT's options."""

from __future__ import annotations

from nanorlhf.config.option import config
from nanorlhf.config.training import TrainConfig


@config
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: demonstrations, learned by heart; rewards, if any, judge held-out prompts only."""
