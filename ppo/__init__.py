"""PPO: a critic is the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.ppo.algorithm import PPO, PPOTrainer
    from nanorlhf.ppo.config import PPOConfig

__all__ = ["PPO", "PPOConfig", "PPOTrainer"]
__getattr__ = lazily("nanorlhf.ppo", __all__)
