"""Measures that every baseline makes the storyteller's words richer, and what its brevity penalty is for.

    python -m evidence.learning.richness

Goes on where it was stopped: a run that stands in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from evidence.results import RESULTS, ROOT, spread, where, write
from nanorlhf.cli import parse
from nanorlhf.reinforce import REINFORCEConfig, REINFORCETrainer
from nanorlhf.rloo import RLOOConfig, RLOOTrainer

NO_PENALTY = ["--reward_options", "{lexical_richness: {brevity_penalty_scale: 0}}"]
RUNS = {
    **{f"reinforce, {name}": ["reinforce", "--baseline", name] for name in ("none", "mean", "ema", "greedy")},
    "rloo": ["rloo"],
    "reinforce, mean, no penalty": ["reinforce", "--baseline", "mean", *NO_PENALTY],
    "rloo, no penalty": ["rloo", *NO_PENALTY],
}
TRAINERS = {"reinforce": (REINFORCEConfig, REINFORCETrainer), "rloo": (RLOOConfig, RLOOTrainer)}


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, writes each figure as it comes, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "richness.json", help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--engine", default="auto", help="auto, vllm or hf (default: %(default)s)")
    args = parser.parse_args(argv)
    runs: list[dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else []
    for seed in range(args.seeds):
        for name, command in RUNS.items():
            if (name, seed) not in [(run["variant"], run["seed"]) for run in runs]:
                runs.append({"variant": name, "seed": seed} | measure(command, seed, args.engine) | where())
                write(args.output, runs)
    print(table(runs))
    return 0


def measure(command: list[str], seed: int, engine: str) -> dict[str, Any]:
    """One run of the recipe: held-out reward and tokens of a story, before and after."""
    name, *options = command
    config_class, trainer = TRAINERS[name]
    with tempfile.TemporaryDirectory() as folder:
        options += ["--recipe", "richness", "--seed", str(seed), "--engine", engine, "--save_steps", "0"]
        options += ["--output_dir", f"{folder}/run"]
        history = trainer(args=parse(config_class, name, ROOT / name / "recipes", options)[1]).train()
    held_out = [row for row in history if "eval/reward" in row]
    return {
        "start": held_out[0]["eval/reward"],
        "end": held_out[-1]["eval/reward"],
        "tokens_start": held_out[0]["eval/length_mean"],
        "tokens_end": held_out[-1]["eval/length_mean"],
        "steps": held_out[-1]["step"],
        "training_seconds": sum(row["time/step"] for row in history[1:]),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Median and range over the seeds, a row for each kind of run."""
    lines = ["| | seeds | held-out reward | tokens of a story | seconds |", "|---|---|---|---|---|"]
    for name in RUNS:
        some = [run for run in runs if run["variant"] == name]
        if some:
            reward = f"{spread(some, 'start', '.2f')} -> {spread(some, 'end', '.2f')}"
            tokens = f"{spread(some, 'tokens_start', '.0f')} -> {spread(some, 'tokens_end', '.0f')}"
            lines.append(f"| {name} | {len(some)} | {reward} | {tokens} | {spread(some, 'training_seconds', '.0f')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
