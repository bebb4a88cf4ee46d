"""Whole runs: the Python call, resuming, stopping, and what is left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanorlhf.config import names
from nanorlhf.config.names import shipped_model
from nanorlhf.errors import RewardError, UsageError
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.grpo.__main__ import main
from nanorlhf.loop import Loop
from nanorlhf.records import checkpoint
from nanorlhf.rloo import RLOOConfig, RLOOTrainer
from nanorlhf.trainer import Trainer

PROMISED = [
    "step",
    "reward/mean",
    "reward/std",
    "reward/exact_answer",
    "loss",
    "kl",
    "entropy",
    "clip_fraction",
    "grad_norm",
    "learning_rate",
    "completion/length_mean",
    "completion/length_max",
    "completion/truncated_fraction",
    "samples/dropped_fraction",
    "groups/no_spread_fraction",
    "mismatch/mean_abs",
    "mismatch/max_abs",
    "time/rollout",
    "time/reward",
    "time/measure",
    "time/update",
    "time/sync",
    "time/step",
    "tokens/rollout",
    "tokens/trained",
    "throughput/tokens_per_s",
    "throughput/episodes_per_s",
    "throughput/tail_fraction",
    "throughput/pace",
    "memory/peak_gib",
    "memory/token_budget",
]


def small(run: Path) -> dict[str, Any]:
    """Options of a run of seconds, whose rewards need no process of their own."""
    options: dict[str, Any] = {"model_name_or_path": "nanorlhf:adder", "reward_funcs": "exact_answer", "engine": "hf"}
    options |= {"dataset_name": "arithmetic", "dataset_test_split": "test", "max_prompt_length": 32, "device": "cpu"}
    options |= {"prompts_per_step": 4, "num_generations": 4, "eval_prompts": 8, "max_completion_length": 16}
    options |= {"reward_workers": 0}
    return options | {"max_steps": 4, "learning_rate": 1e-3, "eval_steps": 2, "output_dir": str(run)}


def config(run: Path, **options: Any) -> GRPOConfig:
    """The same, with some options changed."""
    return GRPOConfig(**small(run) | options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(run: Path) -> tuple[list[Any], list[Any], dict[str, torch.Tensor]]:
    """Samples, metrics without clocks, and the final adapter."""
    samples = lines(run / "samples.jsonl")
    metrics = [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "memory/"))}
        for row in lines(run / "metrics.jsonl")
    ]
    last = names.latest(run)
    assert last is not None
    return samples, metrics, load_file(last / "adapter_model.safetensors")


def assert_same_outcome(a: Path, b: Path) -> None:
    (samples, metrics, adapter), (samples2, metrics2, adapter2) = outcome(a), outcome(b)
    assert samples == samples2
    assert metrics == metrics2
    assert adapter.keys() == adapter2.keys()
    assert all(adapter[name].equal(adapter2[name]) for name in adapter)


def take(trainer: Trainer, count: int) -> None:
    """Trains some steps and leaves."""
    with contextlib.closing(trainer.steps()) as steps:
        for _ in range(count):
            next(steps)


@dataclass(frozen=True, slots=True)
class Trained:
    """A run that ended, with what train() returned and what the terminal showed."""

    run: Path
    history: list[dict[str, Any]]
    said: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run for tests that only look at it."""
    run, said = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        history = GRPOTrainer(args=config(run, save_steps=1)).train()
    return Trained(run, history, said.getvalue())


def test_what_a_run_leaves_behind(trained: Trained) -> None:
    run, rows = trained.run, lines(trained.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert not [name for row in rows[1:] for name in PROMISED if name not in row]
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 2, 4]
    assert rows == json.loads(json.dumps(trained.history))
    assert all(row["mismatch/mean_abs"] < 1e-4 for row in rows[1:] if row["mismatch/mean_abs"] is not None)
    assert len(lines(run / "samples.jsonl")) == 4 * 16
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_000003", "step_000004"]
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "the first prompt as the model sees it: '<|im_start|>user" in trained.said
    assert "held-out reward" in trained.said
    last = run / "checkpoints" / "step_000004"
    base = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"))
    PeftModel.from_pretrained(base, str(last))
    assert AutoTokenizer.from_pretrained(last).chat_template


@pytest.mark.parametrize(
    "options", [{}, {"updates_per_step": 2, "kl_coef": 0.05, "lora_dropout": 0.1}, {"lora": "none", "kl_coef": 0.05}]
)
def test_stop_and_resume_equals_never_stopping(options: dict[str, Any], trained: Trained, tmp_path: Path) -> None:
    if options.get("lora") == "none":
        options = options | {"learning_rate": 1e-4}
    whole = tmp_path / "whole" if options else trained.run
    if options:
        take(GRPOTrainer(args=config(whole, **options)), 4)
    take(GRPOTrainer(args=config(tmp_path / "parts", **options)), 2)
    take(GRPOTrainer(args=config(tmp_path / "parts", **options, resume=str(tmp_path / "parts"))), 2)
    if options.get("lora") == "none":
        a, b = (load_file(run / "checkpoints/step_000004/model.safetensors") for run in (whole, tmp_path / "parts"))
        assert all(a[name].equal(b[name]) for name in a)
        assert lines(whole / "samples.jsonl") == lines(tmp_path / "parts/samples.jsonl")
    else:
        assert_same_outcome(whole, tmp_path / "parts")


def test_resume_on_the_command_line_forgets_steps_after_the_checkpoint(trained: Trained, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    trainer = GRPOTrainer(args=config(parts, save_steps=2))
    with contextlib.closing(trainer.steps()) as steps:
        for _ in range(3):
            next(steps)
        trainer.version_done = -1  # as if killed in the middle of the fourth step: nothing more is saved
    assert [row["step"] for row in lines(parts / "metrics.jsonl")] == [0, 1, 2, 3]
    assert main(["--resume", str(parts)]) == 0
    assert_same_outcome(trained.run, parts)


def test_a_run_killed_after_its_last_checkpoint_is_made_whole(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    kept = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    del kept["config.yaml"]
    (run / "learning_curve.png").write_bytes(b"of an earlier step")
    (run / ".learning_curve.png.draft").write_bytes(b"half of the new one")
    (run / "checkpoints" / ".step_000002.gone").mkdir()
    history = GRPOTrainer(args=config(run, save_steps=1, resume=str(run))).train()
    assert [row["step"] for row in history] == [0, 1, 2, 3, 4]
    assert "all 4 steps are done; say a larger max_steps to go on" in capsys.readouterr().out
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert found.pop("config.yaml")
    assert found == kept


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_lets_the_step_finish_and_saves(
    number: int, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupting(completions: list[Any]) -> list[float]:
        os.kill(os.getpid(), number)
        return [float(len(c)) for c in completions]

    before = signal.getsignal(number)
    args = config(tmp_path / "run", dataset_test_split=None, reward_workers=0)
    trainer = GRPOTrainer(reward_funcs=interrupting, args=args)
    trainer.train()
    assert trainer.done == 1
    assert checkpoint.step_of(names.latest(tmp_path / "run")) == 1
    assert f"stopped after step 1, by {name}; go on with --resume" in capsys.readouterr().out
    assert signal.getsignal(number) is before


def test_the_second_signal_ends_at_once_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "update", twice)
    options = config(tmp_path / "run").to_dict() | {"max_steps": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    assert main(["--recipe", str(tmp_path / "recipe.yaml")]) == 130
    assert "nanorlhf grpo: interrupted; go on with --resume" in capsys.readouterr().err


def test_a_run_stops_for_what_it_was_told_to_stop_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"max_completion_length": 2, "dataset_test_split": None, "stop_on": ["truncation"]}
    trainer = GRPOTrainer(args=config(tmp_path / "run", **options))
    trainer.train()
    assert trainer.done == 1 and "stopped after step 1, for truncation; go on with" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"stop_on.*'truncation'"):
        config(tmp_path / "run", stop_on=["truncations"])


def test_a_resumed_run_says_what_changed_and_refuses_to_be_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    take(GRPOTrainer(args=config(run)), 1)
    with pytest.raises(UsageError, match=r"seed from 0 to 1, lora_r from 32 to 8: with this the checkpoint .* no use"):
        GRPOTrainer(args=config(run, resume=str(run), lora_r=8, seed=1))
    with pytest.raises(UsageError, match=r"algorithm from 'grpo' to 'rloo'"):
        RLOOTrainer(args=RLOOConfig(**small(run), resume=str(run)))
    take(GRPOTrainer(args=config(run, resume=str(run), temperature=0.9)), 1)
    assert "going on with other options than before: temperature from 1.0 to 0.9\n" in capsys.readouterr().out


def test_an_evaluation_is_told_the_steps_before_it(tmp_path: Path) -> None:
    def curriculum(completions: list[str], trainer_state: Any) -> list[float]:
        return [trainer_state.global_step for _ in completions]

    history = GRPOTrainer(reward_funcs=curriculum, args=config(tmp_path / "run", max_steps=2)).train()
    assert [(row.get("reward/mean"), row.get("eval/reward")) for row in history] == [(None, 0), (0, None), (1, 2)]


def test_a_reward_that_raises_stops_the_run_and_keeps_what_was_learned(tmp_path: Path) -> None:
    def third_time(completion_ids: list[list[int]], trainer_state: Any) -> list[float]:
        if trainer_state.global_step >= 2:
            raise OSError("grader is away")
        return [float(len(ids)) for ids in completion_ids]

    trainer = GRPOTrainer(reward_funcs=third_time, args=config(tmp_path / "run", dataset_test_split=None))
    with pytest.raises(RewardError, match="grader is away"):
        trainer.train()
    assert checkpoint.step_of(names.latest(tmp_path / "run")) == 2


@pytest.mark.parametrize("kind", ["object", "peft object", "peft_config", "full"])
def test_the_python_call(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}+11=", "target": str(a + 11)} for a in range(10, 30)]
    dataset = datasets.Dataset.from_list(rows)
    seen: set[str] = set()

    def first_digit(completions: list[str], target: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [float(c[:1] == t[:1]) for c, t in zip(completions, target, strict=True)]

    name = shipped_model("nanorlhf:adder")
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if kind == "peft object":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    args = config(
        tmp_path / "run",
        dataset_name="",
        model_name_or_path="",
        max_steps=2,
        reward_workers=0,
        lora="none" if kind == "full" else "all-linear",
    )
    trainer = GRPOTrainer(
        model=name if kind == "peft_config" else model,
        reward_funcs=[first_digit],
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
        if kind == "peft_config"
        else None,
    )
    history = trainer.train()
    assert len(history) == 3
    assert {"prompts", "completion_ids"} <= seen
    trained = len(trainer.policy.trainable)
    assert trained == {"object": 42, "peft object": 6, "peft_config": 6, "full": 38}[kind]


def test_what_those_who_come_from_trl_look_for(tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}+11=", "answer": str(a + 11)} for a in range(10, 20)]
    args = config(tmp_path / "run", num_train_epochs=0.5, dataset_test_split=None)
    trainer = GRPOTrainer(args=args, train_dataset=rows)
    assert trainer.state.global_step == 0 and trainer.state.log_history == []
    history = trainer.train()
    assert (trainer.state.global_step, trainer.state.max_steps) == (2, 2), "half of ten rows, four a step"
    assert trainer.state.log_history == history
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_steps"] == 2
    assert isinstance(trainer.model, PeftModel)
    trainer.save_model(str(tmp_path / "mine"))
    base = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"))
    saved = PeftModel.from_pretrained(base, str(tmp_path / "mine")).state_dict()
    assert all(saved[name].equal(p) for name, p in trainer.model.named_parameters() if "lora" in name)
    assert AutoTokenizer.from_pretrained(tmp_path / "mine").chat_template


def test_a_run_whose_completions_never_end_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GRPOTrainer(args=config(tmp_path / "run", max_completion_length=2, max_steps=1, dataset_test_split=None)).train()
    said = capsys.readouterr().out
    assert "completions end with <|im_end|>, or after 2 tokens" in said
    assert "step 1: 100% of completions hit max_completion_length without an end token (try a larger" in said
    assert "nothing can be learned from this step" in said


def test_an_engine_left_stale_is_said_at_the_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = GRPOTrainer(
        reward_funcs=lambda completions: [float(len(str(c))) for c in completions],
        args=config(tmp_path / "run", engine_check="off"),
    )
    trainer.engine.update = lambda weights: None  # type: ignore[method-assign]
    take(trainer, 2)
    assert "step 2: the engine is stale: it serves version 0" in capsys.readouterr().out


def test_trackers_are_real_and_a_resumed_run_goes_on_with_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it looks at the variable when it is imported
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run, options = tmp_path / "run", {"report_to": "wandb,tensorboard,trackio", "tags": ["mine"], "max_steps": 2}
    take(GRPOTrainer(args=config(run, **options)), 1)
    take(GRPOTrainer(args=config(run, **options, resume=str(run))), 1)
    identity = json.loads((run / "trackers.json").read_text())["id"]
    offline = list((run / "wandb").glob("offline-run-*"))
    assert len(offline) == 2
    assert all(folder.name.endswith(identity) for folder in offline)
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    assert list((tmp_path / "trackio").rglob("*.db"))


def test_bad_ends_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no completion could end"):
        GRPOTrainer(model=model, args=config(tmp_path / "run"), processing_class=tokenizer)


def test_a_model_whose_rows_hold_one_sample_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = GRPOTrainer(args=GRPOConfig(**small(tmp_path / "run")))
    try:
        trainer.introduce()
        assert "a row for each sample" not in capsys.readouterr().out
        trainer.loop.passes.one_per_row = True
        trainer.introduce()
        assert "recurrent layers: a row for each sample, and its prompt in each" in capsys.readouterr().out
    finally:
        trainer.close()
