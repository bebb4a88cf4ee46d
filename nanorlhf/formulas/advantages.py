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
    """(S,) GRPO, arXiv:2402.03300: (r - mean) / (std + eps).

    The std is the group's, the batch's (Lite PPO, arXiv:2508.08221), or none (Dr. GRPO, arXiv:2503.20783).
    """
    _, mean, std = group_stats(rewards, group)
    centred = rewards.double() - mean
    if scale == "group":
        centred = centred / (std + eps)
    elif scale == "batch":
        scored = rewards[~rewards.isnan()].double()
        centred = centred / (scored.std() + eps) if len(scored) > 1 else centred
    teaches = has_spread(rewards, group) & ~rewards.isnan()
    return torch.where(teaches, centred, 0.0).float()


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """(S,) RLOO, arXiv:2402.14740: r minus the mean of the others in the group."""
    count, mean, _ = group_stats(rewards, group)
    centred = count / (count - 1).clamp(min=1) * (rewards.double() - mean)
    return centred.nan_to_num(0.0).float()


def opo(rewards: Tensor, group: Tensor, lengths: Tensor) -> Tensor:
    """(S,) OPO, arXiv:2505.23585: r minus the length-weighted mean of the group."""
    scored = ~rewards.isnan()
    weight = lengths.double() * scored
    zeros = torch.zeros(int(group.max()) + 1, dtype=torch.double)
    total = zeros.clone().index_add_(0, group, weight * rewards.double().nan_to_num(0.0))
    baseline = total / zeros.index_add_(0, group, weight).clamp(min=1)
    return torch.where(has_spread(rewards, group) & scored, rewards.double() - baseline[group], 0.0).float()


def maxrl(rewards: Tensor, group: Tensor) -> Tensor:
    """(S,) MaxRL: (r - m) / |m| with m the group's mean; 0 if m is 0."""
    _, mean, _ = group_stats(rewards, group)
    return ((rewards.double() - mean) / mean.abs()).nan_to_num(0.0, 0.0, 0.0).float()


def gpg(rewards: Tensor, group: Tensor) -> Tensor:
    """(S,) GPG, arXiv:2504.02546: alpha (r - m), alpha = samples / samples in groups with spread."""
    _, mean, _ = group_stats(rewards, group)
    scored = ~rewards.isnan()
    teaches = has_spread(rewards, group) & scored
    alpha = scored.sum().double() / teaches.sum().clamp(min=1)
    return torch.where(teaches, alpha * (rewards.double() - mean), 0.0).float()


def best_of_group(scores: Tensor, group: Tensor) -> Tensor:
    """(S,) RAFT, arXiv:2304.06767: the first of a group's best; none if the group has no spread."""
    value = scores.nan_to_num(-torch.inf)
    best = torch.full((int(group.max()) + 1,), -torch.inf).scatter_reduce_(0, group, value, "amax")
    first = torch.zeros(len(scores), dtype=torch.bool)
    seen: set[int] = set()
    for i in ((value == best[group]) & has_spread(scores, group)).nonzero().flatten().tolist():
        if int(group[i]) not in seen:
            seen.add(int(group[i]))
            first[i] = True
    return first


def whiten(values: Tensor) -> Tensor:
    """Mean 0 and unbiased std 1; the mean goes too, and what differs by rounding only comes to exactly 0."""
    exact = values.double()
    rounding = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    if exact.max() - exact.min() <= rounding:
        return torch.zeros_like(values)
    return ((exact - exact.mean()) / torch.sqrt(exact.var() + 1e-8)).to(values.dtype)


def token_rewards(scores: Tensor, each: Tensor, lengths: Tensor) -> Tensor:
    """(N,) rewards of tokens: `each (N,)`, and the sample's score `(S,)` on its last token."""
    ends = lengths.cumsum(0) - 1
    written = lengths > 0
    return each.index_add(0, ends[written], scores[written].to(each.dtype))


def sum_by_sample(values: Tensor, sample: Tensor, samples: int) -> Tensor:
    """(S,) sums of `values (N,)`."""
    return torch.zeros(samples, dtype=values.dtype).index_add_(0, sample, values)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N,), arXiv:1506.02438; each sample is an episode, and after its end the value is 0."""
    advantages = torch.zeros_like(rewards)
    start = 0
    for length in lengths.tolist():
        following_value = following = 0.0
        r, v = rewards[start : start + length].tolist(), values[start : start + length].tolist()
        out = [0.0] * length
        for t in reversed(range(length)):
            following = r[t] + gamma * following_value - v[t] + gamma * lam * following
            following_value = v[t]
            out[t] = following
        advantages[start : start + length] = torch.tensor(out)
        start += length
    return advantages, advantages + values


def reward_to_go(rewards: Tensor, lengths: Tensor, gamma: float = 1.0) -> Tensor:
    """(N,) discounted sum of this token's reward and those after it in the sample."""
    return gae(rewards, torch.zeros_like(rewards), lengths, gamma, 1.0)[1]
