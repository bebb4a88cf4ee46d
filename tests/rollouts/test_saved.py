"""Rollouts that were kept are the rollouts that were, and can be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.ppo import PPOConfig, PPOTrainer
from nanorlhf.records.directory import read_lines
from nanorlhf.records.rollout_files import keep, read
from nanorlhf.remax import ReMaxConfig, ReMaxTrainer
from tests.samples import rollout, sample


def test_what_is_read_is_what_was_kept(tmp_path: Path) -> None:
    kept = rollout([sample(3, 4, seed=i, own=[True, False, True, True] if i % 2 else None) for i in range(4)], 2)
    kept.samples[0].reward, kept.rewards[0] = None, torch.nan
    kept.samples[1].rewards = {"a": 1.0, "b": None}
    kept.samples[2].prompt.columns["hint"] = "half a character \ud800, and é"
    kept.baselines = torch.tensor([0.0, 0.0, 1.0, 1.0])
    advantages = torch.arange(int(kept.lengths.sum())).float()
    keep(tmp_path, 7, kept, advantages)
    again = read(path := tmp_path / "rollouts" / "step_000007.parquet")
    written = pyarrow.parquet.read_table(path).column("advantages").to_pylist()
    assert [len(part) for part in written] == kept.lengths.tolist() and [
        x for part in written for x in part
    ] == advantages.tolist()
    assert [(s.prompt, s.completion_ids, s.own, s.stopped, s.rewards, s.reward) for s in again.samples] == [
        (s.prompt, s.completion_ids, s.own, s.stopped, s.rewards, s.reward) for s in kept.samples
    ]
    torch.testing.assert_close(again.rewards, kept.rewards, equal_nan=True)
    assert again.group.tolist() == kept.group.tolist()
    assert again.baselines is not None and again.baselines.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(again.columns["engine_logprobs"], kept.columns["engine_logprobs"])


def given(run: Path, **others: Any) -> dict[str, Any]:
    every: dict[str, Any] = {"model_name_or_path": "nanorlhf:adder", "reward_funcs": "exact_answer", "engine": "hf"}
    every |= {"dataset_name": "arithmetic", "max_prompt_length": 32, "prompts_per_step": 4, "num_generations": 4}
    every |= {"max_completion_length": 16, "max_steps": 2, "learning_rate": 1e-3, "output_dir": str(run)}
    return every | others


def options(run: Path, **others: Any) -> GRPOConfig:
    return GRPOConfig(**given(run, **others))


def test_training_on_kept_rollouts(tmp_path: Path) -> None:
    first = GRPOTrainer(args=options(tmp_path / "a")).train()
    trainer = GRPOTrainer(args=options(tmp_path / "b", rollouts_from=str(tmp_path / "a"), max_steps=3))
    assert not hasattr(trainer, "engine"), "nobody has to write anything"
    again = trainer.train()
    assert again[1]["reward/mean"] == first[1]["reward/mean"]
    assert again[1]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4), "the same policy, the same step"
    assert again[2]["loss"] == pytest.approx(first[2]["loss"], abs=1e-5)
    assert again[3]["importance/weight_mean"] != 1, "step 1's rollout again, by then of another policy"
    assert not (tmp_path / "b" / "rollouts").exists()


def test_kept_rollouts_are_scored_anew_by_the_rewards_that_are_named(tmp_path: Path) -> None:
    GRPOTrainer(args=options(tmp_path / "a")).train()
    short = GRPOTrainer(
        reward_funcs=lambda completion_ids: [-float(len(ids)) for ids in completion_ids],
        args=options(tmp_path / "b", rollouts_from=str(tmp_path / "a"), max_steps=1),
    ).train()
    assert short[1]["reward/mean"] == -short[1]["completion/length_mean"]
    unjudged = options(tmp_path / "c", rollouts_from=str(tmp_path / "a"), max_steps=1, reward_funcs=[])
    assert 0 <= GRPOTrainer(args=unjudged).train()[1]["reward/mean"] <= 1


def test_lengths_are_punished_in_kept_rollouts_too(tmp_path: Path) -> None:
    GRPOTrainer(args=options(tmp_path / "a", max_steps=1)).train()
    fed = options(tmp_path / "b", rollouts_from=str(tmp_path / "a"), max_steps=1, overlong_buffer=15)
    (punished,) = [row for row in GRPOTrainer(args=fed).train() if row["step"] == 1]
    excess = (punished["completion/length_mean"] - 1) / 15
    assert punished["reward/mean"] == pytest.approx(punished["reward/exact_answer"] - excess, abs=1e-5)


def test_the_baseline_of_greedy_answers_is_that_of_the_kept_rewards(tmp_path: Path) -> None:
    def remax(run: str, **others: Any) -> ReMaxTrainer:
        return ReMaxTrainer(args=ReMaxConfig(**given(tmp_path / run, max_steps=1, **others)))

    GRPOTrainer(args=options(tmp_path / "groups", max_steps=1)).train()
    first = remax("a").train()
    again = remax("b", rollouts_from=str(tmp_path / "a")).train()
    assert again[-1]["loss"] == pytest.approx(first[-1]["loss"], abs=1e-5)
    with pytest.raises(UsageError, match="no rewards of greedy answers"):
        remax("c", rollouts_from=str(tmp_path / "groups"))
    with pytest.raises(UsageError, match="greedy answers, this run's baseline, are not kept"):
        remax("d", rollouts_from=str(tmp_path / "a"), reward_funcs="lexical_richness").train()


def test_a_critic_learns_from_kept_rollouts_without_an_engine(tmp_path: Path) -> None:
    GRPOTrainer(args=options(tmp_path / "a", max_steps=1)).train()
    fed = PPOConfig(**given(tmp_path / "b", max_steps=1, rollouts_from=str(tmp_path / "a")))
    (row,) = [row for row in PPOTrainer(args=fed).train() if row["step"] == 1]
    assert row["value/loss"] > 0


def test_kept_episodes_earn_what_they_earned(tmp_path: Path) -> None:
    played = {"environment": "guessing", "dataset_name": "", "reward_funcs": [], "max_completion_length": 64}
    played |= {"max_prompt_length": 128}
    GRPOTrainer(args=options(tmp_path / "a", max_steps=1, **played)).train()
    GRPOTrainer(args=options(tmp_path / "b", rollouts_from=str(tmp_path / "a"), max_steps=1, **played)).train()
    (first, again) = ([row for row in read_lines(tmp_path / run / "metrics.jsonl") if row["step"]] for run in "ab")
    assert again[0]["reward/environment"] == first[0]["reward/environment"]


def test_wrong_settings_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are no rollouts"):
        GRPOTrainer(args=options(tmp_path / "b", rollouts_from=str(tmp_path)))
    GRPOTrainer(args=options(tmp_path / "a", max_steps=1)).train()
    with pytest.raises(UsageError, match="has groups of 4 samples, this run of 2"):
        GRPOTrainer(args=options(tmp_path / "c", rollouts_from=str(tmp_path / "a"), num_generations=2))
    with pytest.raises(UsageError, match="dynamic_sampling=2 cannot work: the samples of rollouts_from are drawn"):
        GRPOTrainer(args=options(tmp_path / "c", rollouts_from=str(tmp_path / "a"), dynamic_sampling=2))
    assert not (tmp_path / "c").exists(), "before anything is loaded"
