"""The cost of slow rewards: a step against its rollout and against its scoring, with a reward of 50 ms of CPU a sample.

    python -m evidence.speed.slow_rewards

Writes results/overlap.json: for each number of workers, medians over steps of the step's time, of the rollout alone
(from a run whose reward costs nothing), of the update, and the rest of the step over the larger of rollout and scoring,
which nothing can beat.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from evidence.results import RESULTS, write
from nanorlhf.grpo import GRPOConfig, GRPOTrainer

COST, PROMPTS, GROUP = 0.05, 16, 4


def busy(completions: list[Any]) -> list[float]:
    """Keeps a core busy for COST seconds a completion."""
    for _ in completions:
        end = time.process_time() + COST
        while time.process_time() < end:
            pass
    return [float(len(str(c))) for c in completions]


def idle(completions: list[Any]) -> list[float]:
    """The same scores for nothing."""
    return [float(len(str(c))) for c in completions]


def steps(reward: Any, workers: int, count: int, engine: str) -> list[dict[str, Any]]:
    """The metrics of some steps; the first, in which everything starts, is left out."""
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            model_name_or_path="nanorlhf:adder",
            dataset_name="arithmetic",
            engine=engine,  # type: ignore[arg-type]
            prompts_per_step=PROMPTS,
            num_generations=GROUP,
            max_prompt_length=32,
            max_completion_length=64,
            max_steps=count + 1,
            reward_workers=workers,
            output_dir=f"{folder}/run",
        )
        return GRPOTrainer(reward_funcs=reward, args=config).train()[2:]


def measured(workers: int, count: int, engine: str) -> dict[str, Any]:
    """One setting in numbers."""
    alone, slow = steps(idle, workers, count, engine), steps(busy, workers, count, engine)
    rollout, update = (median(row[name] for row in alone) for name in ("time/rollout", "time/update"))
    step, scoring = median(row["time/step"] for row in slow), PROMPTS * GROUP * COST / workers
    return {
        "workers": workers,
        "step_s": step,
        "rollout_alone_s": rollout,
        "scoring_s": scoring,
        "update_s": update,
        "step_over_bound": (step - update) / max(rollout, scoring),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--output", type=Path, default=RESULTS / "overlap.json")
    args = parser.parse_args(argv)
    found = {
        "cores": os.cpu_count(),
        "cost_s": COST,
        "samples": PROMPTS * GROUP,
        "engine": args.engine,
        "settings": [measured(workers, args.steps, args.engine) for workers in args.workers],
    }
    write(args.output, found)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
