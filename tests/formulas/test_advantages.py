"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.formulas.advantages import (
    best_of_group,
    gae,
    gpg,
    group_standardise,
    has_spread,
    leave_one_out,
    maxrl,
    opo,
    reward_to_go,
    token_rewards,
    whiten,
)
from tests.samples import expect_close

NAN = math.nan
ONE_GROUP = torch.zeros(4, dtype=torch.long)


def test_group_mean_without_std() -> None:
    expect_close(group_standardise(torch.tensor([1.0, 0, 0, 0]), ONE_GROUP, "none"), [0.75, -0.25, -0.25, -0.25])


def test_unbiased_std() -> None:
    # mean 1/4, squared deviations 9/16 + 3/16 = 3/4, over ddof 1: std = sqrt(1/4) = 1/2
    expect_close(group_standardise(torch.tensor([1.0, 0, 0, 0]), ONE_GROUP, eps=0), [1.5, -0.5, -0.5, -0.5])
    expect_close(group_standardise(torch.tensor([1.0, 0, 0, 0]), ONE_GROUP), [0.75 / 0.5001, *[-0.25 / 0.5001] * 3])


def test_batch_std_scales_all_groups_alike() -> None:
    rewards, group = torch.tensor([1.0, 3, 0, 4]), torch.tensor([0, 0, 1, 1])
    # mean 2, squared deviations 1 + 1 + 4 + 4 = 10, std = sqrt(10/3)
    std = math.sqrt(10 / 3)
    expect_close(group_standardise(rewards, group, "batch", eps=0), [-1 / std, 1 / std, -2 / std, 2 / std])


def test_group_without_spread_is_exactly_zero() -> None:
    rewards = torch.full((4,), 0.1)  # 0.1 is not a binary fraction: a mean in float32 would leave a residue
    assert group_standardise(rewards, ONE_GROUP).eq(0).all()
    assert not has_spread(rewards, ONE_GROUP).any()


def test_unscored_samples_enter_no_mean() -> None:
    rewards = torch.tensor([1.0, NAN, 3.0, NAN])
    expect_close(group_standardise(rewards, ONE_GROUP, "none"), [-1.0, 0.0, 1.0, 0.0])
    alone = torch.tensor([1.0, NAN, NAN, NAN])
    assert group_standardise(alone, ONE_GROUP).eq(0).all()
    assert not has_spread(alone, ONE_GROUP).any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(rewards=st.lists(st.integers(-8, 8), min_size=6, max_size=6), shift=st.integers(-100, 100))
def test_a_constant_added_changes_nothing(scale: str, rewards: list[int], shift: int) -> None:
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    base = torch.tensor(rewards, dtype=torch.float32)
    torch.testing.assert_close(
        group_standardise(base, group, "none"), group_standardise(base + shift, group, "none"), atol=1e-5, rtol=0
    )
    if scale == "group":
        torch.testing.assert_close(
            group_standardise(base, group), group_standardise(base + shift, group), atol=1e-4, rtol=0
        )


@given(rewards=st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=8, max_size=8), order=st.permutations(range(8)))
def test_order_of_samples_does_not_matter(rewards: list[float], order: list[int]) -> None:
    values, group, index = torch.tensor(rewards), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor(order)
    straight = group_standardise(values, group)[index]
    torch.testing.assert_close(group_standardise(values[index], group[index]), straight, atol=1e-6, rtol=0)


def test_leave_one_out() -> None:
    group = torch.tensor([0, 0, 1, 1])
    expect_close(leave_one_out(torch.tensor([6.0, 3.0, 9.0, 12.0]), group), [3, -3, -3, 3])
    rewards = torch.tensor([1.0, NAN, 4.0, 7.0])
    expect_close(leave_one_out(rewards, ONE_GROUP), [1 - 5.5, 0, 4 - 4, 7 - 2.5])  # the mean of the scored others


def test_opo_maxrl_gpg() -> None:
    expect_close(opo(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([1, 3])), [0.75, -0.25])
    expect_close(maxrl(torch.tensor([1.0, 0, 0, 0]), ONE_GROUP), [3, -1, -1, -1])
    assert maxrl(torch.zeros(4), ONE_GROUP).eq(0).all()
    below = maxrl(torch.tensor([-1.0, -2.0, NAN, 0.0]), torch.tensor([0, 0, 0, 1]))
    expect_close(below, [1 / 3, -1 / 3, 0, 0])  # the better answer is still the better one
    rewards, group = torch.tensor([1.0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    expect_close(gpg(rewards, group), [1.0, -1.0, 0, 0])  # alpha = 4 / 2


def test_best_of_group() -> None:
    rewards, group = torch.tensor([1.0, 3, 3, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert best_of_group(rewards, group).tolist() == [False, True, False, False, False, False]
    assert best_of_group(torch.tensor([NAN, 0.0, 1.0]), torch.zeros(3, dtype=torch.long)).tolist() == [
        False,
        False,
        True,
    ]


def test_whiten() -> None:
    expect_close(whiten(torch.tensor([1.0, 2.0, 3.0])), [-1, 0, 1])
    assert whiten(torch.tensor([4.0])).tolist() == [0]
    expect_close(whiten(torch.tensor([1.0, 2.0])), [-(0.5**0.5), 0.5**0.5])
    # Mean 4, squared deviations 9 + 1 + 1 + 9 = 20, unbiased variance 20 / 3.
    expect_close(whiten(torch.tensor([1.0, 3.0, 5.0, 7.0])), [x / (20 / 3) ** 0.5 for x in (-3, -1, 1, 3)])


@pytest.mark.parametrize("value", [0.7, 0.1, -0.3, 1e-6, 12345.678, 0.0])
def test_what_does_not_vary_whitens_to_exactly_nothing(value: float) -> None:
    assert whiten(torch.full((1000,), value)).eq(0).all()


def test_whitening_tells_rounding_from_spread() -> None:
    same = torch.tensor([0.1, 0.2, 0.4]).sum(), torch.tensor([0.4, 0.2, 0.1]).sum(), torch.tensor(0.7)
    assert len({x.item() for x in same}) > 1, "one sum in several orders"
    assert whiten(torch.stack(same)).eq(0).all()
    lengths = torch.tensor([4, 4])
    earned = token_rewards(torch.tensor([0.7, 0.7]), torch.zeros(8), lengths)
    assert whiten(reward_to_go(earned, lengths)).eq(0).all()
    discounted = whiten(reward_to_go(earned, lengths, gamma=0.99))  # what is worth less is no rounding
    assert discounted.std() == pytest.approx(1, abs=1e-3) and discounted[:4].equal(discounted[4:])
    assert whiten(torch.tensor([1000.0, 1000.01])).abs().min() > 0.5, "far more than float32 rounds there"


@pytest.mark.parametrize(
    ("gamma", "lam", "returns", "advantages"),
    [
        (1.0, 1.0, [6, 5, 3], [5.5, 4, 1.5]),
        (0.5, 1.0, [2.75, 3.5, 3], [2.25, 2.5, 1.5]),
        (1.0, 0.5, [3.625, 4.25, 3], [3.125, 3.25, 1.5]),
    ],
)
def test_gae(gamma: float, lam: float, returns: list[float], advantages: list[float]) -> None:
    rewards, values = torch.tensor([1.0, 2, 3] * 2), torch.tensor([0.5, 1, 1.5] * 2)
    got_advantages, got_returns = gae(rewards, values, torch.tensor([3, 3]), gamma, lam)  # two episodes: nothing leaks
    expect_close(got_advantages, advantages * 2)
    expect_close(got_returns, returns * 2)


def test_reward_to_go_and_token_rewards() -> None:
    lengths = torch.tensor([2, 0, 3])
    rewards = token_rewards(torch.tensor([1.0, 9.0, 2.0]), torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5]), lengths)
    expect_close(rewards, [-0.1, 0.8, -0.3, -0.4, 1.5])
    expect_close(reward_to_go(rewards, lengths), [0.7, 0.8, 0.8, 1.1, 1.5])
