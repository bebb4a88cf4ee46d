"""Measures what models learn by their recipes on two CPU cores: `python -m evidence.learning.recipes RECIPE`.

digits: one-digit arithmetic in tags, by GRPO alone, by SFT and then GRPO, by DPO, by PPO. richness, smollm2_richness:
more varied words, by REINFORCE with each of its baselines and by RLOO, and what the brevity penalty prevents. Every
stage is a command `nanorlhf ALGORITHM --recipe RECIPE`. Goes on where it was stopped: a run that stands in the file is
not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.learning import commands
from evidence.results import RESULTS, spread, where, write
from nanorlhf.records.plots import canvas

SHOWN = 3  # samples that are kept of the first step and of the last


@dataclass(frozen=True, slots=True)
class Command:
    """One command: an algorithm, and options over its recipe."""

    algorithm: str
    options: tuple[str, ...] = ()


NO_PENALTY = ("--reward_options", "{lexical_richness: {brevity_penalty_scale: 0}}")


def reinforce(baseline: str, *options: str) -> list[Command]:
    """REINFORCE as it is by default, where only `none` is whitened."""
    return [Command("reinforce", ("--baseline", baseline, "--whiten_advantages", "auto", *options))]


RICHNESS = {
    **{f"reinforce, {name}": reinforce(name) for name in ("none", "mean", "ema", "greedy")},
    "rloo": [Command("rloo")],
    "rloo, no penalty": [Command("rloo", NO_PENALTY)],
}
SHORT_SFT = Command("sft", ("--max_steps", "10"))  # thirty steps know the problems by heart
RUNS: dict[str, dict[str, list[Command]]] = {  # of each recipe
    "digits": {
        "grpo": [Command("grpo")],
        "sft, grpo": [SHORT_SFT, Command("grpo", ("--learning_rate", "3e-4", "--max_steps", "60"))],
        "sft, grpo at 5e-4": [SHORT_SFT, Command("grpo")],
        "dpo": [Command("dpo")],
        "ppo": [Command("ppo")],
    },
    "richness": RICHNESS | {"reinforce, mean, no penalty": [Command("reinforce", NO_PENALTY)]},
    "smollm2_richness": RICHNESS
    | {
        "reinforce, mean, light KL": reinforce("mean", "--kl_coef", "0.0006"),
        "reinforce, greedy, whitened": [Command("reinforce", ("--baseline", "greedy", "--whiten_advantages", "on"))],
    },
}
TINY = ("--model_name_or_path", "nanorlhf:adder", "--engine", "hf", "--max_steps", "2", "--eval_prompts", "4")


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, writes each run as it ends, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RUNS)
    parser.add_argument("--only", nargs="+", metavar="RUN", help="some of its runs, by name (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="(default: results/RECIPE.json)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny only shows that it works")
    args = parser.parse_args(argv)
    path: Path = args.output or (RESULTS if args.size == "full" else commands.TRIALS) / f"{args.recipe}.json"
    wanted = RUNS[args.recipe]
    if unknown := set(args.only or []) - wanted.keys():
        parser.error(f"{args.recipe} has no run {', '.join(sorted(unknown))}: choose from {'; '.join(wanted)}")
    runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for seed in range(args.seeds):
        for name in args.only or wanted:
            if (name, seed) not in [(run["variant"], run["seed"]) for run in runs]:
                options = [*TINY] if args.size == "tiny" else []
                stages = measure(wanted[name], args.recipe, seed, options)
                runs.append({"variant": name, "seed": seed, "stages": stages} | where())
                write(path, runs)
    print(table(runs))
    return 0


def measure(stages: list[Command], recipe: str, seed: int, options: list[str]) -> list[dict[str, Any]]:
    """The stages, each from where the one before left the model."""
    done, before = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, stage in enumerate(stages):
            run = Path(folder) / str(number)
            more = [*stage.options, "--seed", str(seed), *options, *before]
            done.append(train(stage.algorithm, recipe, run, more))
            before = ["--adapter_name_or_path", str(run)]
    return done


def train(algorithm: str, recipe: str, run: Path, options: list[str]) -> dict[str, Any]:
    """One stage: figures of held-out prompts on the way, its time, and samples of its first and last step."""
    start = time.perf_counter()
    commands.train(algorithm, recipe, run, options)
    kept = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    last = kept[-1]["step"] if kept else 0
    return {
        "algorithm": algorithm,
        **commands.curve(run),
        "seconds": time.perf_counter() - start,
        "samples": {
            name: [{"prompt": s["prompt"], "completion": s["completion"], "reward": s["reward"]} for s in some[:SHOWN]]
            for name, some in (
                ("first", [s for s in kept if s["step"] == 1]),
                ("last", [s for s in kept if s["step"] == last]),
            )
        },
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Median and range over the seeds, a row for each stage of each kind of run."""
    measured = {name for run in runs for name in run["stages"][-1]["curve"][-1]}
    figures = ["reward", "numeric" if "numeric" in measured else "length_mean"]
    lines = [f"| | seeds | steps | {' | '.join(f'held-out {name}' for name in figures)} | seconds of steps |"]
    lines.append("|" + "---|" * (4 + len(figures)))
    for name in dict.fromkeys(run["variant"] for run in runs):
        some = [run["stages"] for run in runs if run["variant"] == name]
        for number, stage in enumerate(some[0]):
            ends = [stages[number]["curve"] for stages in some]
            cells = [
                f"{spread([e[0] for e in ends], figure, '.2f')} -> {spread([e[-1] for e in ends], figure, '.2f')}"
                for figure in figures
            ]
            seconds = spread([stages[number] for stages in some], "training_seconds", ".0f")
            words = name if len(some[0]) == 1 else f"{name}: {stage['algorithm']}"
            lines.append(f"| {words} | {len(some)} | {stage['steps']} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def examples(runs: list[dict[str, Any]]) -> str:
    """An answer of the first step and one of the last, of the first seed of each kind of run with one stage."""
    said: dict[str, list[str]] = {}  # by answer, who gave it
    for run in runs:
        if run["seed"] == 0 and len(run["stages"]) == 1:
            (stage,) = run["stages"]
            for step, end in ((1, "first"), (stage["steps"], "last")):
                sample = stage["samples"][end][0]
                words = " ".join(sample["completion"].split()).replace("|", "\\|")
                said.setdefault(f"{step} | {sample['reward']:.2f} | {words}", []).append(run["variant"])
    names = ("each at first" if len(who) > 1 else who[0] for who in said.values())
    rows = [f"| {name} | {answer} |" for name, answer in zip(names, said, strict=True)]
    return "\n".join(["| | step | reward | an answer |", "|---|---|---|---|", *rows])


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out reward by steps: a colour for each kind of run with one stage, a line for each seed."""
    figure, axes = canvas(7, 3.8)
    kinds = [name for name in dict.fromkeys(run["variant"] for run in runs) if "," not in name]
    for number, name in enumerate(kinds):
        some = [run["stages"][0] for run in runs if run["variant"] == name]
        for seed, stage in enumerate(some):
            steps, rewards = ([point[figure] for point in stage["curve"]] for figure in ("step", "reward"))
            label = None if seed else name.upper()
            axes.plot(steps, rewards, color=f"C{number}", marker=".", label=label)
    axes.set(xlabel="steps", ylabel="held-out reward", ylim=(0, 1))
    if kinds:
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
