"""Runs made up for tests of what reads them: their files as a trainer leaves them, without any training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from transformers import AutoTokenizer

from nanorlhf.config.names import shipped_model
from nanorlhf.grpo import GRPOConfig

NASTY = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    '<!-- <svg onload="window.hacked=1"> ${window.hacked = 1} $title ]]> &lt;b&gt; javascript:window.hacked=1'
)
WORDS = ["so", "the", "sum", "is", "then", "<answer>", "142", "</answer>", "or", "ünlike", "一二三", "🙂", "add", "ten"]


def write_run(
    folder: Path,
    steps: int = 4,
    groups: int = 2,
    size: int = 4,
    words: int = 12,
    seed: int = 0,
    tokens: bool = True,
    advantages: bool = True,
    nasty: str = "",
    **options: Any,
) -> Path:
    """A run of so many steps; every prompt comes again after ten steps, and tokens are those of the shipped model."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    config = GRPOConfig(model_name_or_path="nanorlhf:adder", max_steps=steps, output_dir=str(folder), **options)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    about = {"algorithm": "grpo", "machine": "a machine", "began": "2026-01-01 00:00:00", "versions": {"torch": "2.13"}}
    (folder / "run.json").write_text(json.dumps(about))
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder")) if tokens else None
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "samples.jsonl").open("w") as samples:
        metrics.write(json.dumps({"step": 0, "eval/reward": 0.21875, "time/eval": 0.25}) + "\n")
        for step in range(1, steps + 1):
            metrics.write(json.dumps(metrics_of(step, steps, groups * size, draw)) + "\n")
            rows = [
                one_sample(step, (step * groups + group) % (10 * groups), words, draw, nasty)
                for group in range(groups)
                for _ in range(size)
            ]
            if tokenizer:
                keep_tokens(folder, step, rows, tokenizer, advantages, draw)
            samples.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return folder


def metrics_of(step: int, steps: int, samples: int, draw: random.Random) -> dict[str, Any]:
    done = step / steps
    times = {"rollout": 0.5 + draw.random(), "reward": 0.1, "measure": 0.05, "update": 0.7, "sync": 0.01}
    row: dict[str, Any] = {
        "step": step,
        "reward/mean": 0.2 + 0.7 * done + 0.05 * draw.gauss(0, 1),
        "reward/exact_answer": 0.3 + 0.5 * done,
        "completion/length_mean": 40 - 10 * done + draw.gauss(0, 1),
        "completion/truncated_fraction": 0.95 if step == 2 else 0.0,
        "groups/no_spread_fraction": draw.random() / 3,
        "loss": 0.01 * draw.gauss(0, 1),
        "grad_norm": math.exp(draw.gauss(0, 0.5)),
        "learning_rate": 1e-5 * (1 - done),
        "kl": None if step % 3 == 0 else 0.01 * done,
        "entropy": 0.4 - 0.2 * done,
        "mismatch/mean_abs": 1.5198322535868276e-07 * (1 + draw.random()),
        "mismatch/max_abs": 5.245208740234375e-06 * (1 + draw.random()),
        "tokens/rollout": samples * 40,
        "memory/peak_gib": 0.72979736328125,
    } | {f"time/{name}": seconds for name, seconds in times.items()}
    row["time/step"] = sum(times.values()) + 0.02
    row["throughput/episodes_per_s"] = samples / row["time/step"]
    row["throughput/tokens_per_s"] = samples * 40 / row["time/step"]
    row |= {"throughput/pace": [10 * (24 - part) + step for part in range(24)], "throughput/tail_fraction": 0.375}
    return row | ({"eval/reward": 0.2 + 0.7 * done} if step % 10 == 0 or step == steps else {})


def one_sample(step: int, index: int, words: int, draw: random.Random, nasty: str) -> dict[str, Any]:
    text = " ".join(draw.choices(WORDS, k=words))
    reward = draw.choice([0.0, 1.0, 0.5])
    row = {
        "step": step,
        "index": index,
        "prompt": [{"role": "system" + nasty, "content": "Add." + nasty}, {"role": "user", "content": f"{index}+7="}],
        "completion": text + nasty,
        "reward": reward,
        "rewards": {"exact_answer" + nasty: reward, "format": None},
        "advantage": round(2 * reward - 1 + 0.1 * draw.random(), 6),
        "length": words,
        "stopped": draw.random() > 0.1,
    }
    return row | ({"fault": nasty, "extras": {nasty: {"why": nasty}}} if nasty else {})


def keep_tokens(
    folder: Path, step: int, rows: list[dict[str, Any]], tokenizer: Any, advantages: bool, draw: random.Random
) -> None:
    """A parquet file with the columns that a page reads; each sample's length becomes that of its tokens."""
    kept = []
    for row in rows:
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        row["length"] = len(ids)
        kept.append(
            {"index": row["index"], "completion_ids": ids, "own": None, "logprobs": [-draw.random() for _ in ids]}
        )
        if advantages:
            kept[-1]["advantages"] = [row["advantage"] - i / 10 for i in range(len(ids))]
    (folder / "rollouts").mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(kept), folder / "rollouts" / f"step_{step:06d}.parquet")
