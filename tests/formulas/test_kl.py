"""KL estimates and the adaptive coefficient."""

from __future__ import annotations

import pytest
import torch

from nanorlhf.formulas.kl import ESTIMATORS, adapted, as_loss


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


def test_as_a_loss_the_ratio_counts() -> None:
    # x = .1 and a ratio of 2: values .2, .01, .0096748; d/dlogp of rho x is rho (x + 1), of rho k3 it is rho x, and k2
    # takes the ratio as a number: rho x.
    for name, value, slope in (("k1", 0.2, 2.2), ("k2", 0.01, 0.2), ("k3", 0.0096748, 0.2)):
        logp = torch.tensor(-1.0, dtype=torch.double, requires_grad=True)
        loss = as_loss(name, logp + 1.1, logp + 1 + torch.tensor(2.0, dtype=torch.double).log())
        (gradient,) = torch.autograd.grad(loss, logp)
        assert (loss.item(), gradient.item()) == pytest.approx((value, slope), abs=1e-7)


def test_the_coefficient_follows_its_target() -> None:
    assert adapted(1.0, 0.2, 0.1) == pytest.approx(1.02)  # twice the target: the most that a step may raise it
    assert adapted(1.0, 0.11, 0.1) == pytest.approx(1.01)
    assert adapted(1.0, 0.0, 0.1) == pytest.approx(0.98)
