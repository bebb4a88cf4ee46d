"""Losses against numbers worked out by hand."""

from __future__ import annotations

import torch

from nanorlhf.losses import clipped, clipped_surrogate, k3


def test_clipped_surrogate() -> None:
    ratio, advantages = torch.tensor([2.0, 2.0, 0.5]), torch.tensor([2.0, -2.0, 2.0])
    loss = clipped_surrogate(ratio.log(), torch.zeros(3), advantages, (0.2, 0.2))
    torch.testing.assert_close(loss, torch.tensor([-2.4, 4.0, -1.0]))
    assert clipped(ratio.log(), torch.zeros(3), advantages, (0.2, 0.2)).tolist() == [1, 0, 0]


def test_clip_bounds_are_independent() -> None:
    ratio, advantages = torch.tensor([1.4, 0.6]), torch.tensor([1.0, -1.0])
    loss = clipped_surrogate(ratio.log(), torch.zeros(2), advantages, (0.1, 0.28))
    torch.testing.assert_close(loss, torch.tensor([-1.28, 0.9]))


def test_on_policy_gradient_is_reinforce() -> None:
    logprobs = torch.randn(7, requires_grad=True)
    advantages = torch.randn(7)
    clipped_surrogate(logprobs, logprobs.detach(), advantages, (0.2, 0.2)).sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_k3() -> None:
    torch.testing.assert_close(k3(torch.tensor([0.1]), torch.zeros(1)), torch.tensor([0.0048374]), atol=1e-7, rtol=0)
    assert k3(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0
