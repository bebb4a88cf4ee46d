"""KL estimates and the adaptive coefficient."""

from __future__ import annotations

import pytest
import torch

from nanorlhf.kl import ESTIMATORS, adapted


def test_estimates_at_a_tenth() -> None:
    x = torch.tensor(0.1)
    got = [ESTIMATORS[name](x).item() for name in ("k1", "k2", "k3")]
    assert got == pytest.approx([0.1, 0.005, 0.0048374], abs=1e-7)


def test_all_estimate_the_same_divergence_and_k1_has_no_gradient_as_a_loss() -> None:
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    logp, ref = logits.log_softmax(0), torch.tensor([0.0, 0.1, -0.1]).log_softmax(0)
    p = logp.exp().detach()
    exact = (p * (logp - ref)).sum().item()
    means = {name: (p * f(logp - ref)).sum() for name, f in ESTIMATORS.items()}
    assert means["k1"].item() == pytest.approx(exact, abs=1e-6)
    assert means["k3"].item() == pytest.approx(exact, abs=1e-6)
    (gradient,) = torch.autograd.grad(means["k1"], logits, retain_graph=True)
    assert gradient.abs().max() < 1e-6


def test_the_coefficient_follows_its_target() -> None:
    assert adapted(1.0, 0.2, 0.1) == pytest.approx(1.02)  # twice the target: the most that a step may raise it
    assert adapted(1.0, 0.11, 0.1) == pytest.approx(1.01)
    assert adapted(1.0, 0.0, 0.1) == pytest.approx(0.98)
