"""RLOO: the others of the group are the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.cli import lazily
from nanorlhf.rloo.config import RLOOConfig

if TYPE_CHECKING:
    from nanorlhf.rloo.algorithm import RLOO, RLOOTrainer

__all__ = ["RLOO", "RLOOConfig", "RLOOTrainer"]
__getattr__ = lazily("nanorlhf.rloo.algorithm", "RLOO", "RLOOTrainer")
