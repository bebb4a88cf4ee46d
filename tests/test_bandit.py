"""On a softmax bandit the exact policy gradient is known: which estimators converge to it, and which are biased."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nanorlhf.formulas.advantages import group_standardise, leave_one_out
from nanorlhf.formulas.kl import ESTIMATORS, as_loss
from nanorlhf.grpo import GRPO, GRPOConfig
from nanorlhf.ppo import PPO, PPOConfig
from nanorlhf.rloo import RLOO, RLOOConfig
from nanorlhf.segments import Segments
from nanorlhf.types import MicroBatch, Rollout
from tests.samples import rollout, sample

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


SIX = torch.tensor([0.9, -0.3, 0.1, -1.2, 0.4, 0.0], dtype=torch.double)  # the policy's logits,
REF = torch.tensor([-0.2, 0.5, 0.0, 0.3, -0.9, 0.8], dtype=torch.double).log_softmax(0)
OLD = torch.tensor([0.1, 0.4, -0.7, 0.2, 0.6, -0.5], dtype=torch.double).log_softmax(0)  # who drew, if it was not it,
ENGINE = torch.tensor([0.3, 0.1, -0.2, 0.5, 0.2, -0.1], dtype=torch.double).log_softmax(0)  # or who drew in truth
ESTIMATES = ("k1", "k2", "k3")


def kl_and_gradient(of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A function of the six arms' log-probabilities, and its gradient in the logits."""
    logits = SIX.clone().requires_grad_()
    value = of(logits.log_softmax(0))
    return value.detach(), torch.autograd.grad(value, logits)[0]


def reverse(logp: Tensor) -> Tensor:
    return (logp.exp() * (logp - REF)).sum()


def off(of: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor] = reverse) -> float:
    """The distance of its gradient from the KL's."""
    return (kl_and_gradient(of)[1] - kl_and_gradient(exact)[1]).abs().max().item()


@pytest.mark.parametrize("old", [SIX.log_softmax(0), OLD], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("name", ESTIMATES)
def test_a_kl_as_loss_descends_the_reverse_kl(name: str, old: Tensor) -> None:
    def loss(logp: Tensor) -> Tensor:
        return (old.exp() * as_loss(name, logp - REF, logp - old)).sum()

    assert off(loss) < 1e-12
    assert name == "k2" or (kl_and_gradient(loss)[0] - kl_and_gradient(reverse)[0]).abs() < 1e-12


def test_what_each_estimator_descends_without_its_ratio_or_with_the_wrong_one() -> None:
    old = SIX.log_softmax(0)
    plain = {name: partial(lambda f, logp: (old.exp() * f(logp - REF)).sum(), ESTIMATORS[name]) for name in ESTIMATES}
    assert kl_and_gradient(plain["k1"])[1].abs().max() < 1e-12, "no gradient at all"
    assert off(plain["k2"]) < 1e-12
    assert off(plain["k3"], lambda logp: (REF.exp() * (REF - logp)).sum()) < 1e-12, "the forward KL's"
    assert off(plain["k3"]) > 0.05
    assert off(lambda logp: (old.exp() * (logp - old).exp() * ESTIMATORS["k2"](logp - REF)).sum()) > 0.05


LOSSES = ("clipped", "sequence", "gspo", "cispo", "sapo")


def arms(logp: Tensor, drawn: Tensor, each: int = 1) -> MicroBatch:
    """A draw of every arm with the probability it had, in samples of `each` draws; they earn nothing."""
    count = torch.arange(len(logp))
    flat = {"advantages": torch.zeros_like(logp), "old_logprobs": OLD, "ref_logprobs": REF, "engine_logprobs": drawn}
    nothing = Segments.of([])
    return MicroBatch(count, count, nothing, count, count, count // each, count, count, drawn.exp(), flat)


@pytest.mark.parametrize("correction", ["none", "token", "sequence", "geometric"])
@pytest.mark.parametrize("policy_loss", LOSSES)
@pytest.mark.parametrize("name", ESTIMATES)
def test_the_loss_descends_the_reverse_kl(name: Any, policy_loss: Any, correction: Any) -> None:
    """After updates, with samples of the old policy or, if that is corrected for, of an engine that strays."""
    drawn = OLD if correction == "none" else ENGINE
    options: dict[str, Any] = {"kl_estimator": name, "policy_loss": policy_loss, "importance_correction": correction}
    algorithm = GRPO(GRPOConfig(kl_coef=0.3, importance_cap=100.0, **options))

    def loss(logp: Tensor) -> Tensor:
        batch = arms(logp, drawn)
        found = algorithm.loss(logp, torch.zeros_like(logp), batch)
        kl = (batch.weights * found.stats["kl"]).sum()
        assert name == "k2" or (kl - reverse(logp)).abs() < 1e-12, "what is logged is the KL"
        return (batch.weights * found.tokens).sum() / 0.3

    assert off(loss) < 1e-12


@pytest.mark.parametrize("policy_loss", LOSSES)
@pytest.mark.parametrize("kind", [(GRPO, GRPOConfig), (RLOO, RLOOConfig), (PPO, PPOConfig)])
def test_beside_any_surrogate_a_token_keeps_its_own_ratio(kind: Any, policy_loss: Any) -> None:
    """Unclipped, weighed as the surrogate is, though samples are of two tokens here; what earns nothing has it too."""
    algorithm, config = kind
    options: dict[str, Any] = {"kl_estimator": "k3", "policy_loss": policy_loss, "importance_correction": "sequence"}
    with_kl, without = (algorithm(config(kl_in="loss", kl_coef=coef, **options)) for coef in (0.3, 0.0))
    logp = SIX.log_softmax(0).requires_grad_()
    batch = arms(logp, ENGINE, each=2)
    batch.columns["advantages"] = torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0, -1.0], dtype=torch.double)
    nothing = torch.zeros_like(logp)
    kl = with_kl.loss(logp, nothing, batch).tokens - without.loss(logp, nothing, batch).tokens
    gap = (OLD - ENGINE).reshape(3, 2).sum(1).repeat_interleave(2)
    want = 0.3 * gap.exp().clamp(max=2.0) * as_loss("k3", logp - REF, logp - OLD)
    torch.testing.assert_close(kl, want, atol=1e-12, rtol=0)
    slopes = [torch.autograd.grad(values.sum(), logp, retain_graph=True)[0] for values in (kl, want)]
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=0)


@pytest.mark.parametrize("correction", ["none", "token"])
def test_a_kl_in_the_reward_is_logged_as_that_of_the_policy_before_its_updates(correction: Any) -> None:
    drawn: Rollout = rollout([sample(1, 1, seed=i) for i in range(6)])
    engine = OLD if correction == "none" else ENGINE
    drawn.columns = {"logprobs": OLD, "ref_logprobs": REF, "engine_logprobs": engine}
    algorithm = RLOO(RLOOConfig(importance_correction=correction, importance_cap=100.0))
    logged = (engine.exp() * algorithm.divergence(drawn)).sum()
    assert (logged - reverse(OLD)).abs() < 1e-12
