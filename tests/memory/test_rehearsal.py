"""The rehearsal: what it puts through the model, what it makes of an error, and that it leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from nanorlhf.errors import UsageError
from nanorlhf.learning.critic import Critic
from nanorlhf.loop import Loop
from nanorlhf.memory import rehearsal
from nanorlhf.memory.rehearsal import full_rows, is_needed
from nanorlhf.policy.policy import Policy
from nanorlhf.ppo import PPO, PPOConfig
from nanorlhf.types import MicroBatch


def made_up(**options: Any) -> Loop:
    config = PPOConfig(
        model_name_or_path="nanorlhf:adder", device="cpu", max_prompt_length=8, max_completion_length=32, **options
    )
    policy = Policy(config)
    return Loop(config, PPO(config), policy, source=None, critic=Critic(config, policy))  # type: ignore[arg-type]


def rehearse(loop: Loop) -> None:
    rehearsal.rehearse(loop.learners, loop.passes, loop.config, loop.algorithm.together)


def room_for(loop: Loop, tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets rows of `tokens` through and no longer ones; what was asked for."""
    hidden, asked = loop.policy.hidden, list[int]()

    def limited(batch: MicroBatch, model: Any = None) -> Tensor:
        asked.append(len(batch.input_ids))
        if asked[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(batch, model)

    monkeypatch.setattr(loop.policy, "hidden", limited)
    return asked


def test_the_budget_is_lowered_until_it_fits_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = made_up(token_budget=170, lora_dropout=0.5)
    asked = room_for(loop, 90, monkeypatch)
    weights = {n: p.clone() for n, p in loop.policy.model.named_parameters()}
    random, training = torch.get_rng_state(), loop.policy.model.training
    rehearse(loop)
    assert loop.passes.tokens == 85
    assert asked == [40, 40, 170, 40, 40, 85, 85]  # policy and critic: the longest sample, then a full row
    assert caplog.messages and torch.get_rng_state().equal(random) and loop.policy.model.training == training
    assert all(p.equal(weights[n]) and p.grad is None for n, p in loop.policy.model.named_parameters())
    assert all(not optimizer.adam.state for optimizer in [learner.optimizer for learner in loop.learners])
    assert loop.policy.version == 0


def test_a_longest_sample_that_cannot_be_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = made_up(token_budget=170, gradient_checkpointing=False)
    room_for(loop, 39, monkeypatch)
    with pytest.raises(UsageError, match=r"out of memory \(rehearsal\): a row of 40 tokens does not fit"):
        rehearse(loop)
    assert not loop.policy.recomputes


@pytest.mark.parametrize("share", [0, Fraction(1, 3)])
@pytest.mark.parametrize(("then", "budget"), [(200, 170), (100, 85), (39, None)])
def test_activations_are_recomputed_where_a_plan_was_too_hopeful(
    then: int,
    budget: int | None,
    share: Fraction | int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = made_up(token_budget=170)
    loop.policy.recompute(share)
    hidden, recompute = loop.policy.hidden, loop.policy.recompute

    def roomier() -> None:
        recompute()
        monkeypatch.setattr(loop.policy, "hidden", hidden)
        room_for(loop, then, monkeypatch)

    room_for(loop, 39, monkeypatch)
    monkeypatch.setattr(loop.policy, "recompute", roomier)
    if budget is None:
        with pytest.raises(UsageError, match="a row of 40 tokens does not fit"):
            rehearse(loop)
        return
    rehearse(loop)
    assert loop.policy.recomputes
    assert loop.passes.tokens == budget and "recomputed" in caplog.text


@pytest.mark.parametrize(("together", "lengths"), [(1, [8 + 32] * 4 + [10]), (2, [8, 36, 36] * 2 + [8, 1, 1])])
def test_a_full_row_is_full_of_the_longest_samples(together: int, lengths: list[int]) -> None:
    (row,) = full_rows(made_up().config, 64, 40 * together, 170, together)
    assert row.segments.lengths == lengths
    assert len(row.targets) == len(row.input_ids) - 8 * len(lengths) // (2 * together - 1)


def test_models_of_one_sample_a_row_are_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = made_up(token_budget=170, gradient_checkpointing=False)
    loop.passes.one_per_row = True
    asked = room_for(loop, 39, monkeypatch)
    with pytest.raises(UsageError, match="a row of 40 tokens"):
        rehearse(loop)
    assert asked == [40] and loop.passes.tokens == 170


def test_only_if_the_budget_is_ours_to_choose_and_memory_is_small() -> None:
    ours, cuda = made_up().config, torch.device("cuda")
    assert is_needed(ours, cuda)
    assert not is_needed(ours, torch.device("cpu"))
    assert not is_needed(replace(ours, token_budget=100), cuda)
    assert not is_needed(replace(ours, shard_base=True), cuda)
