"""ReMax: the greedy answer is the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.remax.algorithm import ReMax, ReMaxTrainer
    from nanorlhf.remax.config import ReMaxConfig

__all__ = ["ReMax", "ReMaxConfig", "ReMaxTrainer"]
__getattr__ = lazily("nanorlhf.remax", __all__)
