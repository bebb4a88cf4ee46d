"""How far the policy is from its reference, and the coefficient that holds it there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Schulman, "Approximating KL divergence" (2020); x = logp - ref_logp of the sampled token.
ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: torch.exp(-x) - 1 + x,
}


def adapted(coef: float, kl: float, target: float, gain: float = 0.1) -> float:
    """The next coefficient (arXiv:1909.08593): it follows the KL's distance from its target, 2% a step at most."""
    return coef * (1 + gain * min(max(kl / target - 1, -0.2), 0.2))
