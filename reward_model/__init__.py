"""Reward models: learn from pairs, or from graded answers, to score an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.reward_model.algorithm import RewardModel, RewardModelTrainer
    from nanorlhf.reward_model.config import RewardModelConfig

__all__ = ["RewardModel", "RewardModelConfig", "RewardModelTrainer"]
__getattr__ = lazily("nanorlhf.reward_model", __all__)
