"""PPO: a critic is the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.cli import lazily
from nanorlhf.ppo.config import PPOConfig

if TYPE_CHECKING:
    from nanorlhf.ppo.algorithm import PPO, PPOTrainer

__all__ = ["PPO", "PPOConfig", "PPOTrainer"]
__getattr__ = lazily("nanorlhf.ppo.algorithm", "PPO", "PPOTrainer")
