"""Measures that GRPO teaches the small model tasks of Reasoning Gym: held-out answers right before and after.

    python -m evidence.learning.reasoning_gym

The shipped model knows neither task, so some steps of SFT on the task's own answers make a start that is right now and
then; GRPO goes on from there. Goes on where it was stopped: a run that stands in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.results import RESULTS, spread, where, write
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.rewards.reasoning import reasoning
from nanorlhf.scripts.statistics import p_value, z_score
from nanorlhf.sft import SFTConfig, SFTTrainer

HELD_OUT = 512


@dataclass(frozen=True, slots=True)
class Task:
    """A task, made small by its own options, and how long each stage is."""

    config: str
    sft_steps: int
    grpo_steps: int = 80


TASKS = {
    "chain_sum": Task("min_terms: 3, max_terms: 3, max_digits: 1", 400),  # 3 + 8 - 5, 2,916 of them
    "spell_backward": Task("min_word_len: 3, max_word_len: 4, size: 5000", 350),
}
COMMON: dict[str, Any] = {
    "engine": "hf",
    "device": "cpu",
    "dataset_test_split": "test",
    "max_prompt_length": 128,
    "max_completion_length": 16,
    "prompts_per_step": 64,
    "reward_workers": 0,
    "eval_steps": 0,
    "save_steps": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, writes each figure as it comes, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "gym.json", help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each task (default: %(default)s)")
    args = parser.parse_args(argv)
    runs: list[dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else []
    for name, task in TASKS.items():
        done = {run["seed"] for run in runs if run["task"] == name}
        missing = [seed for seed in range(args.seeds) if seed not in done]
        with tempfile.TemporaryDirectory() as folder:
            for seed in missing:
                if seed == missing[0]:
                    begin(name, task, f"{folder}/start")
                runs.append({"task": name, "seed": seed} | measure(name, task, seed, folder) | where())
                write(args.output, runs)
    print(table(runs))
    return 0


def right(completions: list[Any], entry: list[str], **_: Any) -> list[float]:
    """Gives 1 if the task's own scorer has nothing to object, for it gives parts too."""
    return [float(score == 1) for score in reasoning(completions, entry)]


def options(name: str, task: Task) -> dict[str, Any]:
    """The options that both stages share."""
    config = f"{{{task.config}, test_size: {HELD_OUT}}}"
    return COMMON | {"dataset_name": f"reasoning_gym:{name}", "dataset_config": config}


def begin(name: str, task: Task, folder: str) -> None:
    """The start: all weights of the shipped model trained on the task's answers."""
    SFTTrainer(
        model="nanorlhf:adder",
        reward_funcs="reasoning",
        args=SFTConfig(
            **options(name, task), lora="none", max_steps=task.sft_steps, learning_rate=1e-3, output_dir=folder
        ),
    ).train()


def measure(name: str, task: Task, seed: int, folder: str) -> dict[str, Any]:
    """One run from that start: the share of held-out answers that are right before and after, and its significance."""
    history = GRPOTrainer(
        model=f"{folder}/start",
        reward_funcs=["reasoning", right],
        args=GRPOConfig(
            **options(name, task),
            reward_weights=[1.0, 0.0],
            num_generations=8,
            max_steps=task.grpo_steps,
            learning_rate=2e-3,
            warmup_steps=10,
            eval_prompts=HELD_OUT,
            seed=seed,
            output_dir=f"{folder}/grpo-{seed}",
        ),
    ).train()
    held_out = [row for row in history if "eval/right" in row]
    before, after = held_out[0]["eval/right"], held_out[-1]["eval/right"]
    z = z_score(before, after, HELD_OUT)  # as if they were independent; they share prompts
    return {
        "held_out_prompts": HELD_OUT,
        "start": before,
        "end": after,
        "z": z,
        "p": p_value(z),
        "sft_steps": task.sft_steps,
        "steps": held_out[-1]["step"],
        "training_seconds": sum(row["time/step"] for row in history[1:]),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Median and range over the seeds, a row for each task."""
    lines = ["| | seeds | held-out answers right | largest p | seconds |", "|---|---|---|---|---|"]
    for name in TASKS:
        some = [run for run in runs if run["task"] == name]
        if some:
            change = f"{spread(some, 'start', '.2f')} -> {spread(some, 'end', '.2f')}"
            worst = max(run["p"] for run in some)
            lines.append(
                f"| {name} | {len(some)} | {change} | {worst:.0e} | {spread(some, 'training_seconds', '.0f')} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
