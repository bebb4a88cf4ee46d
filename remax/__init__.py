"""ReMax: the greedy answer is the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.cli import lazily
from nanorlhf.remax.config import ReMaxConfig

if TYPE_CHECKING:
    from nanorlhf.remax.algorithm import ReMax, ReMaxTrainer

__all__ = ["ReMax", "ReMaxConfig", "ReMaxTrainer"]
__getattr__ = lazily("nanorlhf.remax.algorithm", "ReMax", "ReMaxTrainer")
