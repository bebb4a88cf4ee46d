"""GRPO: a group's mean is the baseline, its spread the scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.system.command import lazily

if TYPE_CHECKING:
    from nanorlhf.grpo.algorithm import GRPO, GRPOTrainer
    from nanorlhf.grpo.config import GRPOConfig

__all__ = ["GRPO", "GRPOConfig", "GRPOTrainer"]
__getattr__ = lazily("nanorlhf.grpo", __all__)
