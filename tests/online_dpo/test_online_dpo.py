"""Online DPO: who makes a pair, learning, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nanorlhf.errors import UsageError
from nanorlhf.learning.packing import pack
from nanorlhf.online_dpo import OnlineDPO, OnlineDPOConfig, OnlineDPOTrainer
from nanorlhf.segments import Segments
from nanorlhf.types import MicroBatch, Rollout
from tests.samples import rollout, sample
from tests.sft.test_sft import JUDGED, small, take
from tests.test_trainer import assert_same_outcome

NAN = float("nan")


def config(run: Path, **options: Any) -> OnlineDPOConfig:
    return OnlineDPOConfig(**small(run, JUDGED, options))


def judged(rewards: list[float], each: int) -> Rollout:
    made = rollout([sample(2, 3, seed=i) for i in range(len(rewards))], group_size=each)
    made.rewards = torch.tensor(rewards)
    return made


@pytest.mark.parametrize(
    ("rewards", "each", "verdict"),
    [
        ([1, 0, 0, 1], 2, [1, -1, -1, 1]),
        ([1, 1, 0, 0], 2, [0, 0, 0, 0]),  # a tie teaches nothing
        ([1, NAN, NAN, NAN], 2, [0, 0, 0, 0]),  # nor does a pair of which one was not scored
        ([2, 1, 3, 3], 4, [0, -1, 1, 0]),  # the first of equals
        ([NAN, 0, 0, 5], 4, [0, -1, 0, 1]),
    ],
)
def test_who_makes_a_pair(rewards: list[float], each: int, verdict: list[float]) -> None:
    step, algorithm = judged(rewards, each), OnlineDPO(OnlineDPOConfig())
    credit = algorithm.credit(step)
    assert credit.advantages.tolist() == [v for v in verdict for _ in range(3)]
    assert credit.keep.tolist() == [v != 0 for v in verdict]
    assert algorithm.drop(step).tolist() == [v == 0 for v in verdict]


def test_truncated_answers_may_be_masked() -> None:
    step = judged([3, 2, 1, 0], 4)
    step.samples[0].stopped = False
    assert OnlineDPO(OnlineDPOConfig()).verdict(step).tolist() == [1, 0, 0, -1]
    masking = OnlineDPO(OnlineDPOConfig(mask_truncated_completions=True))
    assert masking.verdict(step).tolist() == [0, 1, 0, -1]


def test_a_kl_in_the_score_is_measured_before_the_pair_is_picked() -> None:
    step, algorithm = judged([1, 0.9], 2), OnlineDPO(OnlineDPOConfig(kl_coef=0.1))
    assert not algorithm.drop(step).any()
    assert algorithm.needs == {"logprobs", "ref_logprobs"}
    step.columns |= {"logprobs": torch.tensor([1.0] * 3 + [0.0] * 3), "ref_logprobs": torch.zeros(6)}
    assert algorithm.verdict(step).tolist() == [-1, 1]  # 1 - 0.1 * 3 against 0.9


def test_a_pair_is_of_one_group_even_if_an_answer_has_no_tokens_of_its_own() -> None:
    step, algorithm = judged([1, 2, 0, 5, 3, 4], 3), OnlineDPO(OnlineDPOConfig(num_generations=3, beta=1.0))
    step.samples[1].own = [False] * 3  # the best of the first group
    credit = algorithm.credit(step)
    step.columns = {"advantages": credit.advantages, "ref_logprobs": torch.zeros(15), "old_logprobs": torch.zeros(15)}
    (batch,) = pack(step, credit.keep, torch.ones(15), 1000, together=2)
    gaps = torch.tensor([0.0, 9.0, 0.2, 0.4, -0.1, 0.0])
    found = algorithm.loss(gaps[batch.sample], batch.weights, batch)
    assert batch.sample.unique().tolist() == [2, 3, 4]
    assert found.stats["margin"].tolist() == pytest.approx([0 - 0.6, 1.2 + 0.3])


def test_the_kl_it_logs_is_that_of_the_policy_of_now() -> None:
    arms = torch.arange(3)
    logp, old, ref = (torch.tensor(x, dtype=torch.double).log() for x in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.4] * 3))
    columns = {"advantages": torch.tensor([1.0, -1.0, 1.0]), "old_logprobs": old, "ref_logprobs": ref}
    batch = MicroBatch(arms, arms, Segments.of([]), arms, arms, arms, arms, arms, old.exp(), columns)
    kl = OnlineDPO(OnlineDPOConfig()).loss(logp, torch.zeros(3), batch).stats["kl"]
    assert (batch.weights * kl).sum().item() == pytest.approx((logp.exp() * (logp - ref)).sum().item(), abs=1e-12)


@pytest.mark.parametrize("options", [{"num_generations": 1}, {"beta": 0.0}, {"kl_in": "loss", "kl_estimator": "k3"}])
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        OnlineDPOConfig(**options)


def test_it_learns_from_its_own_pairs(tmp_path: Path) -> None:
    history = OnlineDPOTrainer(args=config(tmp_path / "run", max_steps=12, prompts_per_step=48, eval_steps=12)).train()
    assert history[1]["loss"] == pytest.approx(math.log(2)) and history[1]["kl"] == 0
    assert history[-1]["eval/reward"] > history[0]["eval/reward"] + 0.2
    assert history[-1]["kl"] > 0
    assert all(row["mismatch/mean_abs"] < 1e-4 for row in history[1:])


def test_a_step_of_ties_changes_nothing(tmp_path: Path) -> None:
    trainer = OnlineDPOTrainer(reward_funcs=lambda completions: [1.0] * len(completions), args=config(tmp_path / "run"))
    before = {n: p.clone() for n, p in trainer.policy.trainable.items()}
    (metrics,) = take(trainer, 1)
    assert metrics["tokens/trained"] == 0 and metrics["loss"] == 0
    assert all(p.equal(before[n]) for n, p in trainer.policy.trainable.items())


def test_stop_and_resume_equals_never_stopping(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_generations": 3, "updates_per_step": 2, "kl_coef": 0.02, "prompts_per_step": 8}
    take(OnlineDPOTrainer(args=config(tmp_path / "whole", **options)), 4)
    take(OnlineDPOTrainer(args=config(tmp_path / "parts", **options)), 2)
    take(OnlineDPOTrainer(args=config(tmp_path / "parts", **options, resume=str(tmp_path / "parts"))), 2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")
