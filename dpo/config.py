"""DPO's options."""

from __future__ import annotations

from nanorlhf.config.option import config, option
from nanorlhf.config.training import TrainConfig


@config
class DPOConfig(TrainConfig):
    """Direct preference optimisation: of two answers one was chosen; rewards, if any, judge held-out prompts only."""

    beta: float = option(
        0.1,
        "How dear it is to leave the reference: the weight of the KL that DPO implies.",
        "training",
        first=True,
        above=0,
    )
