"""GRPO: a group's mean is the baseline, its spread the scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanorlhf.cli import lazily
from nanorlhf.grpo.config import GRPOConfig

if TYPE_CHECKING:
    from nanorlhf.grpo.algorithm import GRPO, GRPOTrainer

__all__ = ["GRPO", "GRPOConfig", "GRPOTrainer"]
__getattr__ = lazily("nanorlhf.grpo.algorithm", "GRPO", "GRPOTrainer")
