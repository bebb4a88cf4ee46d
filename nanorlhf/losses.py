"""Log-probabilities to per-token losses: pure formulas, all `(N,)`."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: tuple[float, float]) -> Tensor:
    """PPO, arXiv:1707.06347: max(-A rho, -A clip(rho, 1 - low, 1 + high))."""
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip[0], 1 + clip[1]))


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: tuple[float, float]) -> Tensor:
    """Which tokens the clip keeps from pushing further, as 0 and 1."""
    ratio = torch.exp(logprobs - old_logprobs)
    return (((ratio < 1 - clip[0]) & (advantages < 0)) | ((ratio > 1 + clip[1]) & (advantages > 0))).float()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference): exp(-x) - 1 + x with x = logp - ref."""
    x = logprobs - ref_logprobs
    return torch.exp(-x) - 1 + x
