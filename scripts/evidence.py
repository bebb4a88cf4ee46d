"""Measures what the README claims: one JSON for each run in results/, and the tables made from them.

Each run is a process of its own; a run whose JSON is there is not made again, so this can be stopped and called anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanorlhf.rundir import machine, read_lines

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
GOAL = 0.9
ALGORITHMS = ("grpo", "ppo", "rloo", "remax", "raft", "reinforce")
FAMILY = ("dapo", "dr_grpo", "gspo", "cispo", "sapo")
ENGINES = {
    "vllm": ["--engine", "vllm"],
    "vllm, adapter": ["--engine", "vllm", "--weight_sync", "lora"],
    "hf": ["--engine", "hf"],
}
START, END = "<!-- {}: made by scripts/evidence.py -->", "<!-- end -->"


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, then writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each run (default: 3)")
    parser.add_argument("--only", choices=["engines", "algorithms", "family"], help="one claim instead of all")
    parser.add_argument("--tables", action="store_true", help="only write the tables from what is there")
    args = parser.parse_args(argv)
    RESULTS.mkdir(exist_ok=True)
    claims: dict[str, list[tuple[str, list[str]]]] = {
        "engines": [(name, ["grpo", "--recipe", "tiny", *options]) for name, options in ENGINES.items()],
        "algorithms": [(name, [name, "--recipe", "tiny"]) for name in ALGORITHMS],
        "family": [(name, ["grpo", "--recipe", f"tiny,{name}"]) for name in FAMILY],
    }
    for claim, variants in claims.items():
        if not args.tables and args.only in (None, claim):
            for seed in range(args.seeds):
                for name, command in variants:
                    measure(claim, name, command, seed)
    write_tables(
        ROOT / "README.md", {claim: table(claim, [name for name, _ in runs]) for claim, runs in claims.items()}
    )
    return 0


def measure(claim: str, name: str, command: Sequence[str], seed: int) -> None:
    """One run, and its JSON; nothing where the JSON is there."""
    path = RESULTS / f"{claim}-{name.replace(', ', '-')}-seed{seed}.json"
    if path.exists():
        return
    print(f"{claim}: {name}, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / f"{name.replace(', ', '-')}, seed {seed}"
        line = [*command, "--seed", str(seed), "--eval_steps", "4", "--save_steps", "0", "--output_dir", str(run)]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", *line], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        if claim == "algorithms" and seed == 2:
            shutil.copy(run / "learning_curve.png", ROOT / name)
        rows = read_lines(run / "metrics.jsonl")
    record = {"claim": claim, "variant": name, "seed": seed, "command": "python -m " + " ".join(line[:-2])}
    record |= {"process_seconds": seconds, **outcome(rows), **where()}
    path.write_text(json.dumps(record, indent=1) + "\n")


def outcome(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a run came to: held-out reward at both ends, the way to the goal, and how exact the engine was."""
    steps = [row for row in rows if "time/step" in row]
    held_out = [(row["step"], row["eval/reward"]) for row in rows if row.get("eval/reward") is not None]
    reached = next((step for step, reward in held_out if reward >= GOAL), None)
    mismatches = [row["mismatch/mean_abs"] for row in steps if row["mismatch/mean_abs"] is not None]
    return {
        "start": held_out[0][1],
        "end": held_out[-1][1],
        "steps": len(steps),
        "steps_to_goal": reached,
        "seconds_to_goal": None
        if reached is None
        else sum(row["time/step"] for row in steps if row["step"] <= reached),
        "training_seconds": sum(row["time/step"] for row in steps),
        "tokens_per_s": statistics.median(row["throughput/tokens_per_s"] for row in steps),
        "largest_mismatch_mean": max(mismatches) if mismatches else None,
        "peak_gib": steps[-1]["memory/peak_gib"],
        "held_out": held_out,
    }


def where() -> dict[str, Any]:
    """The machine and the code."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    return {"commit": commit.strip(), "machine": machine(), "date": time.strftime("%Y-%m-%d")}


def table(claim: str, names: Iterable[str]) -> str:
    """Median and range over the seeds, a row for each variant that was run."""
    lines = [
        "| | seeds | held-out reward | steps to .90 | seconds to .90 | tokens/s | largest mismatch |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        files = sorted(RESULTS.glob(f"{claim}-{name.replace(', ', '-')}-seed*.json"))
        runs = [json.loads(path.read_text()) for path in files]
        if runs:
            mismatches = [r["largest_mismatch_mean"] for r in runs if r["largest_mismatch_mean"] is not None]
            change = f"{spread(runs, 'start', '.2f')} -> {spread(runs, 'end', '.2f')}"
            reached = f"{spread(runs, 'steps_to_goal', '.0f')} | {spread(runs, 'seconds_to_goal', '.0f')}"
            cells = [name, len(runs), change, reached, spread(runs, "tokens_per_s", ",.0f"), f"{max(mismatches):.0e}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def spread(runs: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """The median with the range behind it; a dash where a run never got there."""
    values = [run[key] for run in runs]
    if any(value is None for value in values):
        return f"- ({sum(value is None for value in values)} of {len(values)} never)"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})" if len(values) > 1 else f"{middle:{form}}"


def write_tables(readme: Path, tables: dict[str, str]) -> None:
    """Puts each table between its marks in the README."""
    text = readme.read_text()
    for claim, made in tables.items():
        before, mark, rest = text.partition(START.format(claim))
        if mark:
            text = f"{before}{mark}\n{made}\n{END}{rest.partition(END)[2]}"
    readme.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
