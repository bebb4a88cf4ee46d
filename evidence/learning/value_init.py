"""Does it pay to teach PPO's critic before the first update? The same runs with and without, seed by seed.

Once with the tiny recipe's rewards of 0 and 1, and once with 1 and 2: a reward model's scores have no natural zero
either, and a critic that expects nothing then takes all that the policy does for a success.
`python -m evidence.learning.value_init` writes results/value_init.json; a run that is in there is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evidence.results import ROOT, where, write
from nanorlhf.cli import parse
from nanorlhf.ppo import PPOConfig, PPOTrainer
from nanorlhf.records.directory import read_metrics
from nanorlhf.rewards.exact_answer import exact_answer

RESULTS = ROOT / "results" / "value_init.json"
GOAL = 0.8  # of held-out answers right, sampled
VARIANTS = {"with": [], "without": ["--value_init_prompts", "0"]}
SETTINGS: dict[str, tuple[float, list[str]]] = {  # the reward of a wrong answer, and the options that make it so
    "rewards 0 and 1": (0.0, []),
    "rewards 1 and 2": (1.0, ["--reward_funcs", f"{Path(__file__)}:one_more"]),
}

Runs = dict[str, dict[str, Any]]


def one_more(completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
    """The usual reward, and 1 for nothing."""
    return [reward if reward is None else 1 + reward for reward in exact_answer(completions, answer, **columns)]


def compare_value_init(seeds: Iterable[int], path: Path = RESULTS) -> dict[str, Any]:
    """Runs what is missing; gives every run, and for each setting and variant the median of the steps to the goal."""
    runs: Runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    wanted = {
        f"{setting}, {variant}, seed {seed}": (wrong, [*options, *VARIANTS[variant], "--seed", str(seed)])
        for seed in seeds
        for setting, (wrong, options) in SETTINGS.items()
        for variant in VARIANTS
    }
    for name, (wrong, options) in wanted.items():
        if name not in runs:
            print(f"value_init: {name}", flush=True)
            said = [option.removeprefix(f"{ROOT}/") for option in options]
            runs[name] = {"options": said, **measured(options, wrong), **where()}
            write(path, summary(runs))
    return summary(runs)


def measured(options: list[str], wrong: float) -> dict[str, Any]:
    """One run with the transformers engine until the goal is reached, or the recipe's steps are over."""
    with tempfile.TemporaryDirectory() as folder:
        line = ["--recipe", "tiny", "--engine", "hf", "--eval_steps", "1", "--save_steps", "0", "--output_dir", folder]
        config = parse(PPOConfig, "ppo", ROOT / "ppo" / "recipes", [*line, *options])[1]
        trainer = PPOTrainer(args=config)
        steps = trainer.steps()
        reached = next((row["step"] for row in steps if row["eval/reward"] - wrong >= GOAL), None)
        steps.close()
        first, *rows = read_metrics(trainer.run, trainer.done)
    return {
        "steps_to_goal": reached,
        "seconds_to_goal": None if reached is None else sum(row["time/step"] for row in rows),
        "held_out": [row["eval/reward"] - wrong for row in (first, *rows)],
        "explained_variance": [row["value/explained_variance"] for row in rows],
        "value_init": {name: value for name, value in first.items() if name.startswith("value_init/")},
    }


def summary(runs: Runs) -> dict[str, Any]:
    """Every run, and the medians; a run that never reached the goal counts as endless."""
    medians: dict[str, dict[str, float | None]] = {}
    for setting in SETTINGS:
        medians[setting] = {}
        for variant in VARIANTS:
            steps = [run["steps_to_goal"] for name, run in runs.items() if name.startswith(f"{setting}, {variant}, ")]
            if steps:
                middle = statistics.median(math.inf if s is None else s for s in steps)
                medians[setting][variant] = middle if math.isfinite(middle) else None
    return {"claim": f"steps to {GOAL} of held-out answers right", "median_steps": medians, "runs": runs}


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each variant (default: 5)")
    result = compare_value_init(range(parser.parse_args(argv).seeds))
    for setting, medians in result["median_steps"].items():
        print(f"{setting}: {', '.join(f'{variant} {steps}' for variant, steps in medians.items())}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
