"""GRPO: a group's mean is the baseline, its spread the scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanorlhf.grpo.config import GRPOConfig

if TYPE_CHECKING:
    from nanorlhf.grpo.algorithm import GRPO, GRPOTrainer

__all__ = ["GRPO", "GRPOConfig", "GRPOTrainer"]


def __getattr__(name: str) -> Any:
    """Loads on first use, so that the command line answers before torch is imported."""
    if name not in __all__:
        raise AttributeError(name)
    from nanorlhf.grpo import algorithm

    return getattr(algorithm, name)
