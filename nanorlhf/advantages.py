"""Rewards to advantages: pure formulas. An unscored sample (NaN) enters no mean and gets advantage 0."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def group_stats(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, unbiased std) of each sample's own group, over its scored members; each (S,)."""
    scored = ~rewards.isnan()
    groups = int(group.max()) + 1 if len(group) else 0
    value = rewards.double().nan_to_num(0.0)
    count = torch.zeros(groups, dtype=torch.double).index_add_(0, group, scored.double())
    mean = torch.zeros_like(count).index_add_(0, group, value) / count.clamp(min=1)
    away = torch.where(scored, (value - mean[group]) ** 2, 0.0)
    std = (torch.zeros_like(count).index_add_(0, group, away) / (count - 1).clamp(min=1)).sqrt()
    return count[group], mean[group], std[group]


def has_spread(rewards: Tensor, group: Tensor) -> Tensor:
    """(S,) whether the sample's group has two scored samples of different reward."""
    low = torch.full((int(group.max()) + 1,), torch.inf).scatter_reduce_(
        0, group, rewards.nan_to_num(torch.inf), "amin"
    )
    high = torch.full_like(low, -torch.inf).scatter_reduce_(0, group, rewards.nan_to_num(-torch.inf), "amax")
    return (high > low)[group]


def group_standardise(rewards: Tensor, group: Tensor, scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """(S,) GRPO, arXiv:2402.03300: (r - mean) / (std + eps); scale by batch std (Lite PPO, arXiv:2508.08221) or none (Dr. GRPO, arXiv:2503.20783)."""
    _, mean, std = group_stats(rewards, group)
    centred = rewards.double() - mean
    if scale == "group":
        centred = centred / (std + eps)
    elif scale == "batch":
        scored = rewards[~rewards.isnan()].double()
        centred = centred / (scored.std() + eps) if len(scored) > 1 else centred
    teaches = has_spread(rewards, group) & ~rewards.isnan()
    return torch.where(teaches, centred, 0.0).float()
