"""Every algorithm, and every option that remembers something, goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nanorlhf.config.training import OnPolicyConfig
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.reinforce import REINFORCEConfig, REINFORCETrainer
from nanorlhf.system.random_state import random_state, restore_random
from nanorlhf.trainer import Trainer
from tests.test_trainer import assert_same_outcome, small, take

REMEMBERS = {"kl_coef": 0.05, "kl_target": 0.001, "ref_refresh_steps": 1}
CASES: dict[str, tuple[type[Trainer], type[OnPolicyConfig], dict[str, Any]]] = {
    "adaptive kl and refreshed reference": (GRPOTrainer, GRPOConfig, REMEMBERS),
    "dynamic sampling": (GRPOTrainer, GRPOConfig, {"dynamic_sampling": 2, "overlong_buffer": 4}),
    "ema": (REINFORCETrainer, REINFORCEConfig, {"baseline": "ema", "num_generations": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_stop_and_resume_equals_never_stopping(case: str, tmp_path: Path) -> None:
    trainer, config, options = CASES[case]

    def make(name: str, **more: Any) -> Trainer:
        return trainer(args=config(**small(tmp_path / name) | options | more))

    take(make("whole"), 4)
    take(make("parts"), 2)
    take(make("parts", resume=str(tmp_path / "parts")), 2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_options_of_the_optimizer_may_change(tmp_path: Path) -> None:
    """The rate of now at the step of now, with the moments of before."""
    first = GRPOTrainer(args=GRPOConfig(**small(tmp_path / "run")))
    take(first, 2)
    changed: dict[str, Any] = {"learning_rate": 3e-3, "adam_beta2": 0.9, "weight_decay": 0.1}
    changed["resume"] = str(tmp_path / "run")
    again = GRPOTrainer(args=GRPOConfig(**small(tmp_path / "run") | changed))
    before, after = (trainer.loop.learner.optimizer for trainer in (first, again))
    assert after.learning_rate == pytest.approx(3 * before.learning_rate)
    group = after.adam.param_groups[0]
    assert (group["lr"], group["betas"][1], group["weight_decay"]) == (after.learning_rate, 0.9, 0.1)
    kept, moments = (next(iter(optimizer.adam.state.values()))["exp_avg"] for optimizer in (before, after))
    assert moments.equal(kept) and moments.any()
    now = after.learning_rate
    after.take()
    after.scheduler.step()
    assert 0 < after.learning_rate < now < 3e-3, "it goes on falling"


def test_a_step_that_breaks_off_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a moving average nor in the random numbers of dropout."""
    options = {"baseline": "ema", "num_generations": 2, "lora_dropout": 0.1}

    def make(name: str, **more: Any) -> Trainer:
        return REINFORCETrainer(args=REINFORCEConfig(**small(tmp_path / name) | options | more))

    take(make("whole"), 4)
    trainer = make("parts")
    with contextlib.closing(trainer.steps()) as steps:
        next(steps)
        next(steps)
        with monkeypatch.context() as patch:
            patch.setattr(trainer.loop.learner, "step", interrupt)
            with pytest.raises(KeyboardInterrupt):
                next(steps)
    take(make("parts", resume=str(tmp_path / "parts")), 2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_checkpoint_that_is_named_stays_whatever_the_limit(tmp_path: Path) -> None:
    take(GRPOTrainer(args=GRPOConfig(**small(tmp_path / "run"), save_steps=1, save_total_limit=9)), 3)
    named = tmp_path / "run" / "checkpoints" / "step_000001"
    again = GRPOTrainer(args=GRPOConfig(**small(tmp_path / "run"), resume=str(named), save_total_limit=1))
    assert again.done == 1 and [path.name for path in named.parent.glob("step_*")] == ["step_000001"]


def test_fewer_cards_may_be_seen_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[object] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    restore_random(random_state() | {"cuda": ["of the first", "of the second"]})
    assert restored == ["of the first"]


def test_all_weights_can_get_a_reference_later(tmp_path: Path) -> None:
    full = small(tmp_path / "run") | {"lora": "none", "learning_rate": 1e-4}
    first = GRPOTrainer(args=GRPOConfig(**full))
    start = {name: p.detach().clone() for name, p in first.policy.base.named_parameters()}
    take(first, 1)
    again = GRPOTrainer(args=GRPOConfig(**full | {"resume": str(tmp_path / "run"), "kl_coef": 0.1}))
    assert again.policy.frozen is not None
    assert all(p.equal(start[name]) for name, p in again.policy.frozen.named_parameters()), "it is the start"
    assert any(not p.equal(start[name]) for name, p in again.policy.base.named_parameters())


def test_a_run_is_free_once_it_is_saved_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, free, save = tmp_path / "run", list[bool](), Trainer.save
    trainer = GRPOTrainer(args=GRPOConfig(**small(run)))

    def is_free() -> bool:
        folder = os.open(run, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(folder)
        return True

    monkeypatch.setattr(Trainer, "save", lambda self: (free.append(is_free()), save(self))[1])
    take(trainer, 1)
    assert free == [False] and is_free()
