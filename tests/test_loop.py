"""The update: any micro-batches, any order, the same gradient; and what a step says of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanorlhf.engines.hf import HFEngine
from nanorlhf.grpo import GRPO, GRPOConfig
from nanorlhf.learning.packing import pack, token_weights
from nanorlhf.loop import Loop
from nanorlhf.policy.policy import Policy
from nanorlhf.records.metrics import Averages
from nanorlhf.types import Rollout
from tests.models import tiny
from tests.policy.test_logprobs import Largest
from tests.samples import rollout, sample, updated, whole


def made_up(**options: Any) -> tuple[Loop, Rollout]:
    config = GRPOConfig(
        model_name_or_path="nanorlhf:adder", device="cpu", num_generations=4, prompts_per_step=4, **options
    )
    torch.manual_seed(0)
    policy = Policy(config)
    for p in policy.trainable.values():
        p.data += 0.02 * torch.randn(p.shape)
    loop = Loop(config, GRPO(config), policy, source=None)  # type: ignore[arg-type]
    step = rollout([sample(3 + i % 4, 4 + 3 * i, seed=i) for i in range(16)], group_size=4)
    return loop, step


def gradient(loop: Loop, step: Rollout, token_budget: int, reverse: bool = False) -> Tensor:
    loop.passes.tokens = token_budget
    keep = torch.ones(len(step.samples), dtype=torch.bool)
    with torch.no_grad():
        loop.measure(step, keep)
    credit = loop.algorithm.credit(step)
    step.columns["advantages"] = credit.advantages
    if "old_logprobs" not in step.columns:  # as if there had been an update since: ratios away from 1
        noise = torch.Generator().manual_seed(1)
        step.columns["old_logprobs"] = step.columns["engine_logprobs"] + 0.3 * torch.randn(
            len(credit.advantages), generator=noise
        )
    weights = token_weights(step.lengths, keep, loop.algorithm.norm, 64)
    batches = list(pack(step, keep, weights, token_budget))
    for p in loop.policy.trainable.values():
        p.grad = None
    for batch in reversed(batches) if reverse else batches:
        loop.learner.backward(batch, whole(step), Averages())
    return torch.cat([p.grad.flatten() for p in loop.policy.trainable.values() if p.grad is not None])


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
def test_micro_batches_of_any_size_packed_or_one_by_one_in_any_order(norm: str) -> None:
    loop, step = made_up(kl_coef=0.1, norm=norm)
    whole = gradient(loop, step, 10_000)
    for other in (
        gradient(loop, step, 90),
        gradient(loop, step, 1),
        gradient(loop, step, 0, reverse=True),
        gradient(loop, step, 200, reverse=True),
    ):
        assert (other - whole).norm() / whole.norm() < 1e-5


def test_a_sample_without_tokens_of_its_own_may_lie_alone_in_its_row() -> None:
    loop, step = made_up(kl_coef=0.1)
    step.samples[0] = sample(3, 4, own=[False] * 4)
    step.columns["engine_logprobs"] = step.columns["engine_logprobs"][4:]
    whole, alone = gradient(loop, step, 10_000), gradient(loop, step, 1)
    assert (alone - whole).norm() / whole.norm() < 1e-5


def test_two_updates_are_two_halves_of_whole_groups() -> None:
    _, step = made_up()
    first, second = step.parts(2)
    assert first.tolist() == [True] * 8 + [False] * 8
    assert second.tolist() == [False] * 8 + [True] * 8
    assert torch.stack(list(step.parts(3))).sum(0).tolist() == [1] * 16


def test_first_update_is_on_policy_and_old_logprobs_stay_what_they_were() -> None:
    loop, step = made_up(updates_per_step=2, epochs_per_step=2, learning_rate=1e-2)
    keep = torch.ones(16, dtype=torch.bool)
    loop.measure(step, keep)
    before = step.columns["old_logprobs"].clone()
    metrics = updated(loop, step, loop.algorithm.credit(step), keep)
    assert step.columns["old_logprobs"].equal(before)
    assert loop.policy.version == 4
    assert metrics["clip_fraction"] > 0  # later updates see ratios away from 1
    assert metrics["tokens/trained"] == 2 * int(step.lengths.sum())
    once, step = made_up()
    assert updated(once, step, once.algorithm.credit(step), keep)["clip_fraction"] == 0


def test_the_kl_in_the_reward_is_logged_with_its_samples_importance() -> None:
    loop, step = made_up(kl_in="reward", kl_estimator="k1", kl_coef=0.1, importance_correction="token")
    keep = torch.ones(16, dtype=torch.bool)
    loop.measure(step, keep)
    logged = updated(loop, step, loop.algorithm.credit(step), keep)["kl"]
    gap = step.columns["logprobs"] - step.columns["ref_logprobs"]
    weight = (step.columns["logprobs"] - step.columns["engine_logprobs"]).exp().clamp(max=2.0)
    assert logged == pytest.approx((weight * gap).mean().item()) and logged != pytest.approx(gap.mean().item(), rel=0.1)


def test_dropping_groups_without_spread_changes_no_gradient() -> None:
    loop, step = made_up()
    step.rewards[4:8] = 0.5
    dropped = loop.algorithm.drop(step)
    assert dropped.nonzero().flatten().tolist() == [4, 5, 6, 7]
    credit = loop.algorithm.credit(step)
    everything = updated(loop, step, credit, credit.keep)
    full = {n: p.clone() for n, p in loop.policy.trainable.items()}
    sparse, step = made_up()
    step.rewards[4:8] = 0.5
    fewer = updated(sparse, step, credit, credit.keep & ~dropped)
    assert fewer["tokens/trained"] < everything["tokens/trained"]
    assert fewer["loss"] == pytest.approx(everything["loss"], abs=1e-6)
    assert fewer["grad_norm"] == pytest.approx(everything["grad_norm"], rel=1e-5)
    assert all(torch.allclose(p, full[n], atol=1e-7) for n, p in sparse.policy.trainable.items())


FAMILY: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"norm": "constant", "scale_rewards": "none"},
    "gspo": {"policy_loss": "gspo", "norm": "sequence"},
    "two-updates": {"updates_per_step": 2},
}


@pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY)
def test_gradients_are_those_of_every_sample_with_groups_that_teach_nothing_left_out(options: dict[str, Any]) -> None:
    taken: list[list[Tensor]] = []
    for dropping in (False, True):
        loop, step = made_up(**options)
        step.rewards[4:8], step.rewards[8:12] = 1.0, 0.0
        dropped = loop.algorithm.drop(step)
        assert dropped.float().mean() == 0.5
        loop.measure(step, ~dropped if dropping else torch.ones(16, dtype=torch.bool))
        credit = loop.algorithm.credit(step)
        loop.learner.optimizer.step = lambda loss=0.0: (loss, 0.0)  # gradients add up, and nothing moves
        updated(loop, step, credit, credit.keep & ~dropped if dropping else credit.keep)
        seen = [p.grad for p in loop.policy.trainable.values() if p.grad is not None]
        assert len(seen) == len(loop.policy.trainable)
        taken.append(seen)
    for full, sparse in zip(*taken, strict=True):
        assert full.abs().max() > 0
        torch.testing.assert_close(sparse, full, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("option", [{"kl_coef": 0.1}, {"entropy_coef": 0.1}, {"whiten_advantages": "on"}])
def test_nothing_is_left_out_where_every_sample_has_a_gradient(option: dict[str, Any]) -> None:
    loop, step = made_up(**option)
    step.rewards[4:8] = 0.5
    assert not loop.algorithm.drop(step).any()


def test_a_step_that_teaches_nothing_changes_nothing() -> None:
    loop, step = made_up(weight_decay=0.1)
    step.rewards[:] = 1.0
    before = {n: p.clone() for n, p in loop.policy.trainable.items()}
    metrics = updated(loop, step, loop.algorithm.credit(step), ~loop.algorithm.drop(step))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens/trained"] == 0
    assert all(p.equal(before[n]) for n, p in loop.policy.trainable.items())
    assert loop.policy.version == 0


def test_unscored_samples_leave_loss_and_denominator() -> None:
    loop, step = made_up()
    step.rewards[3] = float("nan")
    credit = loop.algorithm.credit(step)
    assert not credit.keep[3]
    with_hole = updated(loop, step, credit, credit.keep)
    other, _ = made_up()
    fewer = rollout([s for i, s in enumerate(step.samples) if i != 3], group_size=4)
    fewer.group = torch.tensor([0] * 3 + [1] * 4 + [2] * 4 + [3] * 4)
    credit = other.algorithm.credit(fewer)
    assert with_hole["loss"] == pytest.approx(updated(other, fewer, credit, credit.keep)["loss"], abs=1e-6)


def test_a_stale_engine_is_said(caplog: pytest.LogCaptureFixture) -> None:
    loop, _ = made_up()
    engine = HFEngine(loop.policy, None, None, "merged")  # type: ignore[arg-type]
    loop.engine = engine
    engine.update(loop.policy)
    loop.warn_if_stale()
    assert caplog.messages == []
    loop.policy.version += 1
    loop.warn_if_stale()
    assert "serves version 0 of the weights, the policy is at 1" in caplog.text


def test_a_long_answers_update_makes_no_tensor_of_tokens_by_vocabulary_or_by_tokens() -> None:
    tokens, vocabulary = 3000, 4096
    config = GRPOConfig(device="cpu", num_generations=2, prompts_per_step=1, lora_r=4, token_budget=2 * tokens + 8)
    policy = Policy(config, tiny("qwen3", vocab_size=vocabulary, max_position_embeddings=2 * tokens))
    loop = Loop(config, GRPO(config), policy, source=None)  # type: ignore[arg-type]
    step = rollout([sample(8, tokens, vocabulary, seed=i) for i in range(2)], group_size=2)
    everything = torch.ones(2, dtype=torch.bool)
    with Largest() as largest:
        loop.measure(step, everything)
        figures = updated(loop, step, loop.algorithm.credit(step), everything)
    assert figures["tokens/trained"] == 2 * tokens and figures["grad_norm"] > 0
    assert largest.numel < tokens * tokens < tokens * vocabulary
