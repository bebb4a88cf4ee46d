"""SFT: the loss of transformers on the completions alone, learning, resuming, and what comes after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from nanorlhf import assembly
from nanorlhf.config import names
from nanorlhf.config.names import shipped_model
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.records.metrics import Averages, Clock
from nanorlhf.sft import SFTConfig, SFTTrainer
from nanorlhf.sft.__main__ import main
from tests.samples import batches, whole
from tests.test_trainer import assert_same_outcome, lines

SMALL: dict[str, Any] = {
    "model_name_or_path": "nanorlhf:adder", "dataset_name": "arithmetic", "engine": "hf", "device": "cpu",
    "max_prompt_length": 32, "max_completion_length": 16, "prompts_per_step": 16, "max_steps": 4,
    "learning_rate": 2e-3, "eval_steps": 2, "eval_prompts": 32,
}  # fmt: skip
JUDGED: dict[str, Any] = {"dataset_test_split": "test", "reward_funcs": "exact_answer"}


def small(run: Path, *changes: dict[str, Any]) -> dict[str, Any]:
    """Options of a run of seconds."""
    options = SMALL | {"output_dir": str(run)}
    for change in changes:
        options |= change
    return options


def config(run: Path, **options: Any) -> SFTConfig:
    return SFTConfig(**small(run, options))


def take(trainer: Any, count: int) -> list[dict[str, Any]]:
    """Trains some steps and leaves."""
    steps = trainer.steps()
    metrics = [next(steps) for _ in range(count)]
    steps.close()
    return metrics


def test_loss_and_gradient_are_those_of_transformers_with_the_prompt_masked(tmp_path: Path) -> None:
    trainer = SFTTrainer(args=config(tmp_path / "run", lora="none", token_budget=100, temperature=0.5))
    rollout = trainer.loop.source.rollout(1, Clock(), lambda tokens: None)
    credit = trainer.algorithm.credit(rollout)
    found = batches(trainer.loop, rollout, credit, credit.keep)
    assert len(found) > 1
    loss = sum(trainer.loop.learner.backward(batch, whole(rollout), Averages()) for batch in found)
    model = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"), dtype=torch.float32)
    total = torch.zeros(())
    for s in rollout.samples:
        assert s.completion_ids[-1] == trainer.tokenizer.eos_token_id
        labels = torch.tensor([[-100] * len(s.prompt.ids) + s.completion_ids])
        mean = model(input_ids=torch.tensor([s.prompt.ids + s.completion_ids]), labels=labels).loss
        total = total + mean * len(s.completion_ids)
    expected = total / rollout.lengths.sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(model.named_parameters())
    for name, mine in trainer.policy.trainable.items():
        gradients = [p.grad for p in (mine, theirs[name]) if p.grad is not None]
        assert torch.allclose(*gradients, atol=1e-6, rtol=1e-4), name


def test_it_learns_without_an_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "build_engine", None)
    history = SFTTrainer(args=config(tmp_path / "run", max_steps=10, dataset_test_split="test")).train()
    assert history[0]["eval/loss"] > 4 * history[-1]["eval/loss"]
    assert not [name for name in history[-1] if name.startswith(("reward", "groups"))], "health tells by this"
    assert history[-1]["tokens/trained"] > 0
    said = capsys.readouterr().out
    assert "engine none needed" in said
    assert "step 10/10 loss 0.0" in said
    assert "held-out loss" in said


def test_held_out_rewards_are_those_of_the_new_weights(tmp_path: Path) -> None:
    history = SFTTrainer(args=config(tmp_path / "run", max_steps=10, eval_steps=10, **JUDGED)).train()
    assert history[0]["eval/reward"] < 0.4
    assert history[-1]["eval/reward"] > 0.7


def test_stop_and_resume_equals_never_stopping(tmp_path: Path) -> None:
    options = JUDGED | {"lora_dropout": 0.1, "temperature": 0.5}  # at which held-out answers are sampled
    take(SFTTrainer(args=config(tmp_path / "whole", **options)), 4)
    take(SFTTrainer(args=config(tmp_path / "parts", **options)), 2)
    take(SFTTrainer(args=config(tmp_path / "parts", **options, resume=str(tmp_path / "parts"))), 2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_grpo_goes_on_where_sft_ended_and_refers_to_it(tmp_path: Path) -> None:
    first = tmp_path / "sft"
    assert main([*flags(SMALL | JUDGED | {"max_steps": 10}), "--output_dir", str(first)]) == 0
    step = names.latest(first)
    sft = lines(first / "metrics.jsonl")[-1]["eval/reward"]
    for number, adapter in enumerate([first, step]):  # a run means its newest checkpoint
        options = {"num_generations": 4, "kl_coef": 0.1, "max_steps": 2, "adapter_name_or_path": str(adapter)}
        trainer = GRPOTrainer(args=GRPOConfig(**small(tmp_path / f"grpo{number}", JUDGED, options)))
        one, two = take(trainer, 2)
        start = lines(tmp_path / f"grpo{number}" / "metrics.jsonl")[0]
        assert start["eval/reward"] == sft
        assert one["kl"] == pytest.approx(0, abs=1e-6) and two["kl"] > 1e-5


def flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_wrong_input_is_answered_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    wrong = {
        "'completion', or 'messages'; this dataset has prompt, answer": {"dataset_name": rows},
        "say dataset_test_split": {"reward_funcs": "exact_answer"},
        "holds no adapter": {"adapter_name_or_path": tmp_path},
        "lora='none' cannot work": {"adapter_name_or_path": tmp_path, "lora": "none"},
        "unknown option 'num_generations'": {"num_generations": 4},
    }
    for complaint, options in wrong.items():
        assert main([*flags(SMALL | options), "--output_dir", str(tmp_path / "run")]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rewards_may_need_columns_of_the_held_out_rows_only(tmp_path: Path) -> None:
    train = datasets.Dataset.from_list([{"prompt": "12+12=", "completion": "24"}])
    held_out = datasets.Dataset.from_list([{"prompt": "12+12=", "completion": "24", "answer": "24"}])
    args = config(tmp_path / "run", dataset_name="", reward_funcs="exact_answer", max_steps=1)
    assert "eval/reward" in SFTTrainer(args=args, train_dataset=train, eval_dataset=held_out).train()[0]
    with pytest.raises(UsageError, match="needs the column 'answer'"):
        SFTTrainer(args=args, train_dataset=held_out, eval_dataset=train)
