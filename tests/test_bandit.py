"""On a softmax bandit the exact policy gradient is known: which estimators converge to it, and which are biased."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanorlhf.advantages import group_standardise, leave_one_out

LOGITS = torch.tensor([0.2, -0.4, 0.5, 0.0], dtype=torch.double)
VALUES = torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.double)
P = LOGITS.softmax(0)
EXACT = P * (VALUES - (P * VALUES).sum())  # d/dlogits of the expected reward
ROUNDS, GROUP = 40_000, 4


def estimate(advantages: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of A (onehot - p) over many groups of samples."""
    draws = torch.multinomial(P, ROUNDS * GROUP, replacement=True, generator=torch.Generator().manual_seed(0))
    weights = advantages(VALUES[draws].float()).double()
    return torch.zeros(4, dtype=torch.double).index_add_(0, draws, weights) / len(draws) - weights.mean() * P


def ema(rewards: Tensor) -> Tensor:
    """Read before each group is taken in, from 0."""
    out, average = torch.empty_like(rewards), 0.0
    for i in range(0, len(rewards), GROUP):
        out[i : i + GROUP] = rewards[i : i + GROUP] - average
        average = 0.9 * average + 0.1 * float(rewards[i : i + GROUP].mean())
    return out


GROUPS = torch.arange(ROUNDS).repeat_interleave(GROUP)
UNBIASED: dict[str, Callable[[Tensor], Tensor]] = {
    "reinforce": lambda r: r,
    "ema": ema,
    "greedy (remax, scst)": lambda r: r - VALUES[P.argmax()].float(),
    "rloo": lambda r: leave_one_out(r, GROUPS),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_converges_to_the_policy_gradient(name: str) -> None:
    torch.testing.assert_close(estimate(UNBIASED[name]), EXACT, atol=0.006, rtol=0)


def test_the_batch_mean_shrinks_the_gradient_by_one_in_b() -> None:
    got = estimate(lambda r: group_standardise(r, GROUPS, "none"))
    torch.testing.assert_close(got, EXACT * (GROUP - 1) / GROUP, atol=0.006, rtol=0)
    assert (got - EXACT).abs().max() > 0.02


def test_the_group_std_bends_the_gradient() -> None:
    """GRPO's bias: it is not even parallel to the policy gradient, for rare large rewards are scaled down."""
    got = estimate(lambda r: group_standardise(r, GROUPS, "group"))
    cosine = torch.nn.functional.cosine_similarity(got, EXACT, dim=0)
    assert 0.5 < cosine < 0.995
