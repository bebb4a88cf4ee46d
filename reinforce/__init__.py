"""REINFORCE: rewards to go, with any baseline or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.reinforce.algorithm import REINFORCE, REINFORCETrainer
    from nanorlhf.reinforce.config import REINFORCEConfig

__all__ = ["REINFORCE", "REINFORCEConfig", "REINFORCETrainer"]
__getattr__ = lazily("nanorlhf.reinforce", __all__)
