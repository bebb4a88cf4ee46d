"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import torch

from nanorlhf.formulas.losses import (
    by_sequence,
    cispo,
    clipped,
    clipped_surrogate,
    clipped_value,
    dpo,
    importance,
    sapo,
)
from tests.samples import expect_close

CLIP = (0.2, 0.2)


def test_clipped_surrogate() -> None:
    log_ratio, advantages = torch.tensor([2.0, 2.0, 0.5]).log(), torch.tensor([2.0, -2.0, 2.0])
    expect_close(clipped_surrogate(log_ratio, advantages, CLIP), [-2.4, 4.0, -1.0])
    expect_close(clipped_surrogate(log_ratio, advantages, CLIP, dual=1.5), [-2.4, 3.0, -1.0])
    assert clipped(log_ratio, advantages, CLIP).tolist() == [1, 0, 0]


def test_clip_bounds_are_independent() -> None:
    log_ratio, advantages = torch.tensor([1.4, 0.6]).log(), torch.tensor([1.0, -1.0])
    expect_close(clipped_surrogate(log_ratio, advantages, (0.1, 0.28)), [-1.28, 0.9])


def test_on_policy_gradients_of_surrogate_cispo_and_reinforce_are_the_same() -> None:
    logprobs, advantages = torch.randn(7, requires_grad=True), torch.randn(7)
    old = logprobs.detach()
    for loss in (
        clipped_surrogate(logprobs - old, advantages, CLIP),
        cispo(logprobs, logprobs - old, advantages, CLIP),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        torch.testing.assert_close(gradient, -advantages)


def test_sequence_ratios() -> None:
    log_ratio = torch.tensor([0.3, -0.1, 0.1, 0.2], requires_grad=True)
    sample = torch.tensor([7, 7, 7, 3])  # numbers of the rollout, in the order of the row
    expect_close(by_sequence(log_ratio, sample, mean=True).exp().detach(), [1.10517, 1.10517, 1.10517, math.exp(0.2)])
    expect_close(by_sequence(log_ratio, sample, mean=False).detach(), [0.3, 0.3, 0.3, 0.2])
    by_sequence(log_ratio, sample, mean=True)[0].backward()
    expect_close(log_ratio.grad, [1 / 3, 1 / 3, 1 / 3, 0.0])  # type: ignore[arg-type]


def test_cispo_bounds_the_weight_and_keeps_the_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = cispo(logprobs, torch.tensor([2.0, 0.5]).log(), torch.tensor([1.0, 1.0]), (0.2, 0.3))
    expect_close(loss.detach(), [1.3, 1.6])
    loss.sum().backward()
    expect_close(logprobs.grad, [-1.3, -0.8])  # type: ignore[arg-type]


def test_sapo() -> None:
    loss = sapo(torch.tensor([1.0, 1.0, 2.0]).log(), torch.tensor([1.0, -1.0, 1.0]), 1.0, 2.0)
    expect_close(loss, [-2.0, 1.0, -4 / (1 + math.exp(-1))])


def test_importance() -> None:
    gap, sample = torch.tensor([0.3, 0.5, -1.0]), torch.tensor([0, 0, 1])
    weight, cut = importance(gap, sample, "token", 1.4)
    expect_close(weight, [math.exp(0.3), 1.4, math.exp(-1)])
    assert cut.tolist() == [0, 1, 0]
    expect_close(importance(gap, sample, "sequence", 9.0)[0], [math.exp(0.8), math.exp(0.8), math.exp(-1)])
    expect_close(importance(gap, sample, "geometric", 9.0)[0], [math.exp(0.4), math.exp(0.4), math.exp(-1)])


def test_clipped_value() -> None:
    # V moved from 0 to 1 towards R = 2: clipped at .2, (.2 - 2)^2 = 3.24 > 1; away from R = -1: (1 + 1)^2 = 4 > 1.44
    expect_close(clipped_value(torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([2.0, -1.0]), 0.2), [1.62, 2.0])


def test_dpo() -> None:
    expect_close(dpo(torch.tensor([0.0, 2.0]), 0.5), [math.log(2), math.log(1 + math.exp(-1))])
