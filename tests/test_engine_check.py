"""A wrong engine ends the run before its first step, or after its first update; a right one leaves no trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanorlhf.engines.base import Weights
from nanorlhf.engines.hf import HFEngine
from nanorlhf.errors import RunError
from nanorlhf.grpo import GRPOTrainer
from nanorlhf.policy.policy import Policy
from tests.test_trainer import config, lines, take

WAYS: dict[str, dict[str, Any]] = {
    "merged": {},
    "lora": {"weight_sync": "lora"},
    "full": {"lora": "none", "learning_rate": 1e-4},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_checked_is_the_one_that_was_not(way: str, tmp_path: Path) -> None:
    with_check, without = (
        GRPOTrainer(args=config(tmp_path / check, engine_check=check, **WAYS[way])) for check in ("on", "off")
    )
    assert [row.get("loss") for row in with_check.train()] == [row.get("loss") for row in without.train()]
    assert lines(tmp_path / "on" / "samples.jsonl") == lines(tmp_path / "off" / "samples.jsonl")
    assert all(p.equal(without.policy.trainable[name]) for name, p in with_check.policy.trainable.items())


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_the_policy_changes_and_no_random_number_is_drawn(way: str, tmp_path: Path) -> None:
    trainer = GRPOTrainer(args=config(tmp_path / "run", **WAYS[way]))
    before = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    served = {name: p.detach().clone() for name, p in trainer.engine.engine.model.named_parameters()}  # type: ignore[attr-defined]
    version, state, seen = trainer.policy.version, torch.get_rng_state(), list[dict[str, Tensor]]()
    plain = trainer.engine.update

    def update(weights: Any) -> None:
        seen.append({name: p.detach().clone() for name, p in weights.trainable.items()})
        plain(weights)

    trainer.engine.update = update  # type: ignore[method-assign]
    assert trainer.check
    trainer.check.before_training()
    random, true = seen
    assert all(not random[name].equal(before[name]) and true[name].equal(before[name]) for name in true)
    assert all(p.equal(before[name]) for name, p in trainer.policy.model.named_parameters())
    assert all(p.equal(served[name]) for name, p in trainer.engine.engine.model.named_parameters())  # type: ignore[attr-defined]
    assert trainer.policy.version == trainer.engine.version == version
    assert torch.get_rng_state().equal(state)
    trainer.close()


@pytest.mark.parametrize("way", WAYS)
def test_an_engine_that_keeps_old_weights_ends_the_run_before_its_first_step(way: str, tmp_path: Path) -> None:
    trainer = GRPOTrainer(args=config(tmp_path / "run", **WAYS[way]))
    policy = trainer.policy
    before = {name: p.detach().clone() for name, p in policy.trainable.items()}

    def pretends(weights: Weights) -> None:
        trainer.engine.version = weights.version

    trainer.engine.update = pretends  # type: ignore[method-assign]
    with pytest.raises(RunError) as said:
        trainer.train()
    assert "nats a token under random weights, and 0.001 is allowed; use weight_sync" in str(said.value)
    assert str(said.value).startswith("transformers ") and "with engine_check off it would go on" in str(said.value)
    assert trainer.done == 0 and all(p.equal(before[name]) for name, p in policy.trainable.items())


def test_a_layer_that_is_not_handed_over_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Policy.merged

    def merged(policy: Policy, everything: bool = True) -> Iterator[tuple[str, Tensor]]:
        return (named for named in plain(policy, everything) if not named[0].endswith("layers.1.mlp.down_proj.weight"))

    monkeypatch.setattr(Policy, "merged", merged)
    with pytest.raises(RunError, match="under random weights"):
        GRPOTrainer(args=config(tmp_path / "run")).train()
    history = GRPOTrainer(args=config(tmp_path / "unchecked", engine_check="off")).train()
    assert len(history) == 5


@pytest.mark.parametrize("resumed", [False, True])
def test_the_first_update_is_checked_too(resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    if resumed:
        take(GRPOTrainer(args=config(run)), 2)
    trainer = GRPOTrainer(args=config(run, resume=str(run) if resumed else None))
    plain, done = HFEngine.update, trainer.done

    def update(engine: HFEngine, weights: Weights) -> None:
        plain(engine, weights)
        if weights.version > done:
            engine.model.lm_head.weight.data.mul_(0.5)

    monkeypatch.setattr(HFEngine, "update", update)
    with pytest.raises(RunError, match="nats a token under the first update"):
        trainer.train()
    assert trainer.done == done
