"""The policy's distance from its reference, and the coefficient that holds it there."""

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


def as_loss(estimator: str, x: Tensor, log_ratio: Tensor) -> Tensor:
    """(N,) a token's estimate whose gradient, too, is the reverse KL's (arXiv:2512.21852); log_ratio = logp - old_logp.

    Samples come from the old policy, so the token's ratio weighs them, and k1 and k3 need its gradient: without it k1
    has none and k3 has the forward KL's. k2 has the right one by itself, and the ratio's would bend it.
    """
    ratio = log_ratio.exp()
    return ESTIMATORS[estimator](x) * (ratio.detach() if estimator == "k2" else ratio)


def adapted(coef: float, kl: float, target: float, gain: float = 0.1) -> float:
    """The next coefficient (arXiv:1909.08593): it follows the KL's distance from its target, 2% a step at most."""
    return coef * (1 + gain * min(max(kl / target - 1, -0.2), 0.2))
