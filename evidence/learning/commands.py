"""Commands of longer measurements, each made once: what one has left in its folder is not made again."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from evidence.results import RESULTS, ROOT, where, write
from nanorlhf.scripts import evaluate as script

RUNS = ROOT / "runs" / "evidence"
TRIALS = RUNS / "trials"


def command_line(about: str | None) -> argparse.ArgumentParser:
    """The command line of a measurement with seeds."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file of results (default: in results/)")
    parser.add_argument("--runs", type=Path, help="folder of runs (default: in runs/evidence/)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny only shows that it works")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None, name: str) -> argparse.Namespace:
    """Reads the line; file and folder are named after the measurement, and those of a trial lie apart."""
    args = parser.parse_args(argv)
    full = args.size == "full"
    args.output = args.output or (RESULTS if full else TRIALS) / f"{name}.json"
    args.runs = args.runs or (RUNS if full else TRIALS) / name
    return args


def each_seed(path: Path, count: int, measure: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of so many seeds: measures those that the file lacks, and keeps each as it ends."""
    done: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for seed in range(count):
        if seed not in [run["seed"] for run in done]:
            done.append({"seed": seed} | measure(seed) | where())
            write(path, done)
    return done


def train(algorithm: str, recipe: str, run: Path, options: list[str]) -> None:
    """Trains by a recipe, unless that has come to its end before; ends if it is stopped on the way."""
    if ended(run):
        return
    argv = ["--recipe", recipe, "--output_dir", str(run), "--overwrite_output_dir", "--save_steps", "0", *options]
    if importlib.import_module(f"nanorlhf.{algorithm}.__main__").main(argv):
        raise SystemExit(f"{algorithm} {' '.join(argv)} ended with an error")
    if not ended(run):
        raise SystemExit(f"{algorithm} was stopped; the same command begins it again")


def ended(run: Path) -> bool:
    """Whether a run made its last step."""
    if not (run / "metrics.jsonl").exists():
        return False
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return last["step"] == yaml.safe_load((run / "config.yaml").read_text())["max_steps"]


def evaluate(path: Path, model: str, recipe: str, samples: int, options: list[str]) -> list[dict[str, Any]]:
    """Samples of a model by the task of a recipe, with their rewards, as `nanorlhf evaluate` writes them."""
    lines = path.with_suffix(".samples.jsonl")
    if not lines.exists():
        argv = [model, "--recipe", str(ROOT / f"{recipe}.yaml"), "--samples", str(samples), "--greedy", "false"]
        argv += ["--output", str(path), *options]
        if script.main(argv):
            raise SystemExit(f"evaluate {' '.join(argv)} ended with an error")
    return [json.loads(line) for line in lines.read_text().splitlines()]


def curve(run: Path) -> dict[str, Any]:
    """Figures of held-out prompts on the way, and the seconds of all steps."""
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(row.get("time/step", 0.0) for row in history)
    measured = [held_out(row) for row in history if any(name.startswith("eval/") for name in row)]
    return {"curve": measured, "training_seconds": seconds, "steps": history[-1]["step"]}


def held_out(row: dict[str, Any]) -> dict[str, Any]:
    """A step's figures of held-out prompts."""
    names = [name for name in row if name.startswith("eval/")]
    return {"step": row["step"]} | {name.removeprefix("eval/"): row[name] for name in names}
