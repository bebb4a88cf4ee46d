"""PPO: credit by hand, a resumed run bit for bit, and a curve that climbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanorlhf.config import names
from nanorlhf.ppo import PPO, PPOConfig, PPOTrainer
from nanorlhf.records import checkpoint, state_file
from tests.samples import rollout, sample


def config(run: Path, **options: Any) -> PPOConfig:
    small: dict[str, Any] = {
        "model_name_or_path": "nanorlhf:adder", "dataset_name": "arithmetic", "dataset_test_split": "test",
        "reward_funcs": "exact_answer", "engine": "hf", "device": "cpu", "output_dir": str(run), "prompts_per_step": 8,
        "max_prompt_length": 32, "max_completion_length": 12, "max_steps": 4, "learning_rate": 1e-3, "eval_prompts": 8,
        "critic_learning_rate": 1e-3, "value_init_prompts": 40, "value_init_epochs": 1,
    }  # fmt: skip
    return PPOConfig(**small | options)


def test_credit_by_hand() -> None:
    step = rollout([sample(3, 3), sample(2, 2, seed=1)])
    step.rewards = torch.tensor([3.0, float("nan")])
    step.columns |= {
        "values": torch.tensor([0.5, 1.0, 1.5, 9.0, 9.0]),
        "logprobs": torch.tensor([-1.0, -1.0, -1.0, 0.0, 0.0]),
        "ref_logprobs": torch.tensor([-0.5, -1.5, -1.0, 0.0, 0.0]),
    }
    algorithm = PPO(PPOConfig(model_name_or_path="m", kl_coef=2.0, gamma=1.0, lam=0.5))
    credit = algorithm.credit(step)
    # rewards 1, -1, 3; deltas 1.5, -0.5, 1.5; each advantage is its delta and half of the next advantage
    assert credit.advantages[:3].tolist() == pytest.approx([1.625, 0.25, 1.5])
    assert credit.returns is not None and credit.returns[:3].tolist() == pytest.approx([2.125, 1.25, 3.0])
    assert credit.keep.tolist() == [True, False]


@pytest.mark.parametrize(
    "options",
    [
        {"updates_per_step": 2, "epochs_per_step": 2, "lora_dropout": 0.1},
        {"critic_model_name_or_path": "nanorlhf:adder"},
    ],
)
def test_stop_and_resume_equals_never_stopping(options: dict[str, Any], tmp_path: Path) -> None:
    def take(run: Path, count: int, **more: Any) -> None:
        steps = PPOTrainer(args=config(run, **options, **more)).steps()
        for _ in range(count):
            next(steps)
        steps.close()

    def outcome(run: Path) -> tuple[str, list[Any], dict[str, Any]]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        clocks = ("time/", "throughput/", "memory/", "value_init/seconds")
        metrics = [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]
        last = names.latest(run)
        assert last is not None
        return (run / "samples.jsonl").read_text(), metrics, state_file.read(last, checkpoint.STATE)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    take(whole, 4)
    take(parts, 2)
    take(parts, 2, resume=str(parts))
    (samples, metrics, kept), (samples2, metrics2, kept2) = outcome(whole), outcome(parts)
    assert samples == samples2
    assert metrics == metrics2
    critic, critic2 = kept["critic"], kept2["critic"]
    assert all(w.equal(critic2["weights"][name]) for name, w in critic["weights"].items())
    moments, moments2 = (s["optimizer"]["adam"]["state"] for s in (critic, critic2))
    assert len(moments) == len(critic["weights"]) == 44
    assert all(moments[i]["exp_avg_sq"].equal(moments2[i]["exp_avg_sq"]) for i in moments)


@pytest.mark.slow
def test_reward_climbs(tmp_path: Path) -> None:
    recipe = {"prompts_per_step": 64, "learning_rate": 2e-3, "critic_learning_rate": 3e-4, "eval_prompts": 128}
    history = PPOTrainer(args=config(tmp_path / "run", **recipe, max_steps=15, kl_coef=0.0, eval_steps=0)).train()
    assert history[0]["eval/reward"] < 0.45
    assert history[-1]["eval/reward"] > 0.75
