"""Rollouts that were kept are the rollouts that were, and can be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.records.rollout_files import keep, read
from tests.samples import rollout, sample


def test_what_is_read_is_what_was_kept(tmp_path: Path) -> None:
    kept = rollout([sample(3, 4, seed=i, own=[True, False, True, True] if i % 2 else None) for i in range(4)], 2)
    kept.samples[0].reward, kept.rewards[0] = None, torch.nan
    kept.samples[1].rewards = {"a": 1.0, "b": None}
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


def options(run: Path, **others: Any) -> GRPOConfig:
    given: dict[str, Any] = {"model_name_or_path": "nanorlhf:adder", "reward_funcs": "exact_answer", "engine": "hf"}
    given |= {"dataset_name": "arithmetic", "max_prompt_length": 32, "prompts_per_step": 4, "num_generations": 4}
    given |= {"max_completion_length": 16, "max_steps": 2, "learning_rate": 1e-3, "output_dir": str(run)}
    return GRPOConfig(**given | others)


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


def test_wrong_settings_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are no rollouts"):
        GRPOTrainer(args=options(tmp_path / "b", rollouts_from=str(tmp_path)))
    GRPOTrainer(args=options(tmp_path / "a", max_steps=1)).train()
    with pytest.raises(UsageError, match="has groups of 4 samples, this run of 2"):
        GRPOTrainer(args=options(tmp_path / "c", rollouts_from=str(tmp_path / "a"), num_generations=2))
