"""Whole runs through a real vLLM engine."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanorlhf.config.names import shipped_model
from nanorlhf.errors import RunError
from nanorlhf.grpo import GRPOTrainer
from tests.environments.test_protocol import PARROT
from tests.models import tiny
from tests.test_trainer import config, lines

pytestmark = pytest.mark.vllm


def run(folder: Path, steps: int, **options: Any) -> None:
    """Trains some steps and leaves, engine and all, as a stopped process would."""
    options = {"engine": "vllm", "report_to": []} | options
    trainer = GRPOTrainer(args=config(folder, **options))
    with contextlib.closing(trainer.engine), contextlib.closing(trainer.steps()) as ticks:
        for _ in range(steps):
            next(ticks)


# Every prompt begins with the same blocks of the cache, which an evaluation has filled if no process has ended.
SHARED = {"prompt_template": "1 + 2 = 3. " * 12 + "{prompt}", "max_prompt_length": 160, "eval_steps": 1, "kl_coef": 0.1}

PARTIAL = {"partial_rollouts": 0.5, "temperature": 2.0, "max_completion_length": 24, "stop": "</answer>"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [SHARED, {"weight_sync": "lora", "updates_per_step": 2}, PARTIAL])
def test_stop_and_resume_equals_never_stopping(options: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, 4, **options)
    run(parts, 2, **options)
    run(parts, 2, **options, resume=str(parts))
    first, second = (lines(folder / "samples.jsonl") for folder in (whole, parts))
    assert [row["completion"] for row in first] == [row["completion"] for row in second]
    losses = [[row.get("loss") for row in lines(folder / "metrics.jsonl")] for folder in (whole, parts)]
    assert losses[0] == losses[1]
    gaps = [row["mismatch/mean_abs"] for row in lines(parts / "metrics.jsonl")[1:]]
    assert max(gap for gap in gaps if gap is not None) < 1e-4
    if "partial_rollouts" in options:
        rows = lines(parts / "metrics.jsonl")[1:]
        assert any(row["partial/carried_tokens"] for row in rows) and any(row["age/old_fraction"] for row in rows)


def test_every_rollout_and_evaluation_begins_with_an_empty_cache(tmp_path: Path) -> None:
    trainer = GRPOTrainer(args=config(tmp_path / "run", engine="vllm", report_to=[], **SHARED))
    inner, write = trainer.engine.engine.engine, trainer.sampler.write  # type: ignore[attr-defined]
    step, cached = inner.step, list[list[int]]()

    def noted() -> list[Any]:
        outputs = step()
        if cached:  # before, the engine is checked
            cached[-1].extend(output.num_cached_tokens for output in outputs)
        return outputs

    def begun(*args: Any, **options: Any) -> Any:
        cached.append([])
        return write(*args, **options)

    inner.step, trainer.sampler.write = noted, begun  # type: ignore[method-assign]
    with contextlib.closing(trainer.engine), contextlib.closing(trainer.steps()) as ticks:
        for _ in range(2):
            next(ticks)
    assert len(cached) == 5, "an evaluation, and two steps with one each"
    assert [min(tokens) for tokens in cached] == [0] * 5
    assert all(max(tokens) >= 64 for tokens in cached), "within a rollout prompts share their blocks"


def test_the_refresh_left_out_is_said_at_the_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = GRPOTrainer(
        reward_funcs=lambda completions: [float(len(json.dumps(c))) for c in completions],
        args=config(
            tmp_path / "run",
            engine="vllm",
            learning_rate=3e-2,
            dataset_test_split=None,
            max_steps=5,
            engine_check="off",
        ),
    )
    fresh = trainer.engine.update

    def pretends(weights: Any) -> None:
        trainer.engine.version = weights.version

    with contextlib.closing(trainer.engine), contextlib.closing(trainer.steps()) as ticks:
        trainer.engine.update = lambda weights: None  # type: ignore[method-assign]
        next(ticks)
        next(ticks)
        said = capsys.readouterr().out
        assert "step 2: the engine is stale: it serves version 0 of the weights, the policy is at 1" in said
        assert "step 2: engine and trainer disagree" in said
        trainer.engine.update = pretends  # type: ignore[method-assign]
        next(ticks)
        capsys.readouterr()
        mistaken = next(ticks)
        assert mistaken["mismatch/mean_abs"] > mistaken["mismatch/limit"], "though the version it names is the newest"
        assert "stale" not in capsys.readouterr().out
        trainer.engine.update = fresh  # type: ignore[method-assign]
        trainer.engine.update(trainer.policy)
        capsys.readouterr()
        next(ticks)
        assert "stale" not in capsys.readouterr().out


def test_a_wrong_engine_ends_the_run_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanorlhf.engines.vllm.load_adapter", lambda worker, config, tensors: None)
    monkeypatch.setattr("nanorlhf.engines.vllm.lora_request", lambda: None)
    trainer = GRPOTrainer(args=config(tmp_path / "run", engine="vllm", weight_sync="lora"))
    with pytest.raises(
        RunError, match=r"vLLM \d\.\d+\.\d+ \(weight_sync lora\) and the trainer differ by .* weight_sync merg"
    ):
        trainer.train()
    assert trainer.done == 0


def test_a_model_with_experts(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    heads = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "initializer_range": 0.1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = tiny("qwen3_moe", **heads | experts | ends)
    options = config(tmp_path / "run", engine="vllm", dataset_test_split=None, max_steps=2)
    rewards = lambda completions: [float(len(json.dumps(c))) for c in completions]  # noqa: E731
    history = GRPOTrainer(model=model, reward_funcs=rewards, args=options, processing_class=tokenizer).train()
    assert all(row["mismatch/mean_abs"] < 1e-5 for row in history[1:])


def test_episodes_of_several_turns(tmp_path: Path) -> None:
    (tmp_path / "world.py").write_text(PARROT)
    run(tmp_path / "run", 2, environment=f"{tmp_path}/world.py:Parrot", max_completion_length=96)
    rows = lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert all(row["mismatch/max_abs"] < 1e-3 for row in rows)
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert sum(row["tokens/trained"] for row in rows) < sum(row["length"] for row in samples), "some are not its own"


@pytest.mark.slow
def test_an_engine_that_fails_is_started_anew_and_writes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole", 2)
    trainer = GRPOTrainer(args=config(tmp_path / "parts", engine="vllm"))
    inside: Any = trainer.engine.engine
    inner = inside.engine
    plain, calls = inner.step, []

    def step() -> Any:
        calls.append(1)
        if len(calls) == 12:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return plain()

    inner.step = step
    with contextlib.closing(trainer.engine), contextlib.closing(trainer.steps()) as ticks:
        next(ticks)
        assert trainer.engine.engine is not inside
        next(ticks)
    assert "the engine failed (RuntimeError: CUDA error: an illegal memory access" in capsys.readouterr().out
    assert lines(tmp_path / "whole" / "samples.jsonl") == lines(tmp_path / "parts" / "samples.jsonl")


def test_a_kill_leaves_no_temporary_file_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    trainer = GRPOTrainer(args=config(tmp_path / "run", engine="vllm", dataset_test_split=None))
    with contextlib.closing(trainer.engine), contextlib.closing(trainer.steps()) as ticks:
        next(ticks)
        assert list((tmp_path / "tmp").glob("vllm*")) == []
