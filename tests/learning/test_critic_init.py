"""The critic before the first update: solved, then trained while it helps, once in a run's life."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evidence.survival.compare_runs import damage, differences
from nanorlhf.learning import critic_init
from nanorlhf.learning.critic import Critic
from nanorlhf.learning.critic_init import FOLDER, RESULT, Study
from nanorlhf.loop import Loop
from nanorlhf.policy.policy import Policy
from nanorlhf.ppo import PPO, PPOConfig, PPOTrainer
from nanorlhf.records.metrics import explained_variance
from nanorlhf.rollouts.on_policy import OnPolicySource
from nanorlhf.types import MicroBatch
from tests.samples import rollout, sample


def study(**options: Any) -> Study:
    """Made-up episodes, every fourth held out, with returns of our own choice to come."""
    config = PPOConfig(model_name_or_path="nanorlhf:adder", device="cpu", token_budget=100, **options)
    torch.manual_seed(0)
    policy = Policy(config)
    critic = Critic(config, policy)
    loop = Loop(config, PPO(config), policy, source=None, critic=critic)  # type: ignore[arg-type]
    step = rollout([sample(3 + i % 4, 4 + i % 9, seed=i) for i in range(60)])
    step.columns["returns"] = torch.zeros(len(step.sample))
    held_out = torch.arange(60) % 4 == 0
    return Study(critic, loop.passes, step, ~held_out, held_out)


def rows(made: Study, chosen: torch.Tensor) -> list[MicroBatch]:
    (attempt,) = made.attempts(chosen)
    return list(attempt.rows())


def ppo(run: Path, **options: Any) -> PPOTrainer:
    small: dict[str, Any] = {
        "model_name_or_path": "nanorlhf:adder", "dataset_name": "arithmetic", "reward_funcs": "exact_answer",
        "engine": "hf", "device": "cpu", "output_dir": str(run), "prompts_per_step": 4, "max_prompt_length": 32,
        "max_completion_length": 12, "max_steps": 2, "value_init_prompts": 60, "value_init_epochs": 2,
        "value_init_learning_rate": 1e-3,
    }  # fmt: skip
    return PPOTrainer(reward_funcs=options.pop("function", None), args=PPOConfig(**small | options))


def test_returns_that_are_linear_in_the_features_are_found_exactly() -> None:
    made = study()
    with torch.no_grad(), made.critic.active():
        direction = torch.randn(made.critic.head.in_features)
        for batch in rows(made, torch.ones(60, dtype=torch.bool)):
            made.rollout.columns["returns"][batch.tokens] = made.critic.features(batch) @ direction + 5
    assert made.explained() == 0
    made.solve_head()
    explained = made.explained()
    assert explained is not None and explained > 0.999
    with torch.no_grad():
        batch = rows(made, made.held_out)[0]
        assert torch.allclose(made.critic.values(batch), batch.columns["returns"], atol=0.3)


def test_returns_that_nothing_predicts_leave_the_mean() -> None:
    made = study()
    noise = torch.Generator().manual_seed(3)
    made.rollout.columns["returns"] = 2 + torch.randn(len(made.rollout.sample), generator=noise)
    made.solve_head()
    explained = made.explained()
    assert explained is not None and abs(explained) < 0.1
    with torch.no_grad():
        values = torch.cat([made.critic.values(b) for b in rows(made, made.held_out)])
    assert values.mean().item() == pytest.approx(2, abs=0.3)


def test_the_best_epoch_stays_and_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    made = study(value_init_learning_rate=1e-3)
    made.rollout.columns["returns"] = torch.linspace(0, 1, len(made.rollout.sample))
    scores, seen = iter([0.1, 0.2, 0.4, 0.3, 0.4, 0.9]), []

    def explained() -> float:
        seen.append(made.critic.snapshot())
        return next(scores)

    monkeypatch.setattr(made, "explained", explained)
    assert made.fit() == 2
    assert len(seen) == 5  # before the first epoch, and after each of four
    assert all(p.equal(seen[2][name]) for name, p in made.critic.weights.items())
    assert not made.critic.head.weight.equal(seen[3]["head.weight"])


def test_it_learns_on_one_set_of_prompts_and_explains_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = ppo(tmp_path / "run", lora_dropout=0.1)
    assert trainer.loop.critic is not None
    policy = {name: p.clone() for name, p in trainer.policy.model.named_parameters() if ".critic." not in name}
    before = torch.get_rng_state()
    result = trainer.initialise_critic(SimpleNamespace(writing=lambda tokens: None))  # type: ignore[arg-type]
    assert torch.get_rng_state().equal(before)  # what follows draws the same numbers as in a resumed run
    assert result["value_init/explained_variance_before"] == 0
    assert result["value_init/explained_variance_after"] >= result["value_init/explained_variance_head"] > 0.05
    assert result["value_init/episodes"] == 60 and result["value_init/epochs"] <= 2
    assert "explained variance of held-out returns 0.000 -> 0." in caplog.text
    assert all(p.equal(policy[n]) for n, p in trainer.policy.model.named_parameters() if ".critic." not in n)
    assert trainer.loop.critic.optimizer.adam.state_dict()["state"] == {}


def test_episodes_carry_monte_carlo_returns(tmp_path: Path) -> None:
    trainer = ppo(tmp_path / "run", gamma=0.5, num_generations=2)
    source = trainer.loop.source
    assert isinstance(source, OnPolicySource)
    rollout = source.beforehand(60, lambda tokens: None)
    returns = critic_init.returns(rollout, 0.5)
    assert len({s.prompt.index for s in rollout.samples}) == 60 and len(rollout.samples) == 120
    at = 0
    for s in rollout.samples:
        length = len(s.completion_ids)
        reward = s.reward or 0.0
        assert np.allclose(returns[at : at + length], [reward * 0.5**k for k in range(length)][::-1])
        at += length


def test_its_episodes_do_not_count_as_the_first_steps(tmp_path: Path) -> None:
    def counted(completions: list[str], log_metric: Any) -> list[float]:
        log_metric("completions", len(completions))
        return [0.0 for _ in completions]

    trainer = ppo(tmp_path / "run", function=counted, max_steps=1, reward_workers=0)
    assert [row.get("reward/counted/completions") for row in trainer.train()] == [None, 4]


def test_it_is_done_once_in_a_runs_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ppo(tmp_path / "run")
    steps = first.steps()
    next(steps)
    first.version_done = -1  # as if killed in the second step: there is no checkpoint, only what value_init kept
    steps.close()
    kept = (tmp_path / "run" / FOLDER / RESULT).read_text()
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()
    monkeypatch.setattr(critic_init, "learn", None)
    again = ppo(tmp_path / "run", resume=str(tmp_path / "run"))
    history = again.train()
    assert [row["step"] for row in history] == [0, 1, 2]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2]
    assert "value_init/explained_variance_after" in history[0]
    assert (tmp_path / "run" / FOLDER / RESULT).read_text() == kept


def test_a_kill_in_the_middle_of_it_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = whole, cut = tmp_path / "whole", tmp_path / "cut"
    ppo(whole, lora_dropout=0.1).train()
    left, descend = [1, 1], Study.descend
    monkeypatch.setattr(Study, "descend", lambda made, *given: (left.pop(), descend(made, *given)))
    with pytest.raises(IndexError):
        ppo(cut, lora_dropout=0.1).train()
    monkeypatch.undo()
    assert not (cut / FOLDER).exists()
    (cut / f".{FOLDER}.draft").mkdir()
    (cut / f".{FOLDER}.draft" / "half").touch()
    ppo(cut, lora_dropout=0.1, resume=str(cut)).train()
    assert differences(whole, cut) == [] and damage(cut, ended=True) == []
    first, second = (load_file(run / FOLDER / "critic.safetensors") for run in runs)
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_model_that_never_earns_anything_is_no_trouble(tmp_path: Path) -> None:
    trainer = ppo(tmp_path / "run", reward_funcs="exact_answer", max_completion_length=2, max_steps=1)
    history = trainer.train()
    assert history[0]["value_init/explained_variance_after"] is None
    assert history[0]["value_init/epochs"] == 0
    assert history[1]["value/explained_variance"] is None


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    history = ppo(tmp_path / "run", value_init_prompts=0, max_steps=1).train()
    assert not [name for name in history[0] if name.startswith("value_init")]
    assert not (tmp_path / "run" / FOLDER).exists()


def test_explained_variance_of_the_solved_head_is_what_moments_promise() -> None:
    made = study()
    made.rollout.columns["returns"] = torch.sin(torch.arange(len(made.rollout.sample)) / 3)
    with torch.no_grad(), made.critic.active():
        pairs = [(made.critic.features(b), b.columns["returns"]) for b in rows(made, made.train)]
        both = torch.cat([torch.cat([x, y[:, None]], 1) for x, y in pairs]).double()
        mean, covariance = made.moments(made.train)
    assert torch.allclose(mean, both.mean(0))
    assert torch.allclose(covariance, torch.cov(both.T, correction=0), atol=1e-8)
    assert explained_variance(both[:, -1], both[:, -1]) == 1
