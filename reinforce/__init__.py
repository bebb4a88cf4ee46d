"""REINFORCE: rewards to go, with any baseline or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.cli import lazily
from nanorlhf.reinforce.config import REINFORCEConfig

if TYPE_CHECKING:
    from nanorlhf.reinforce.algorithm import REINFORCE, REINFORCETrainer

__all__ = ["REINFORCE", "REINFORCEConfig", "REINFORCETrainer"]
__getattr__ = lazily("nanorlhf.reinforce.algorithm", "REINFORCE", "REINFORCETrainer")
