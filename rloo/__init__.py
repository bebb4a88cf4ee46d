"""RLOO: the others of the group are the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.rloo.algorithm import RLOO, RLOOTrainer
    from nanorlhf.rloo.config import RLOOConfig

__all__ = ["RLOO", "RLOOConfig", "RLOOTrainer"]
__getattr__ = lazily("nanorlhf.rloo", __all__)
