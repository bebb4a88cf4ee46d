"""Do several processes learn what one does, and how much sooner?

    python -m evidence.learning.several_processes

One run's rollouts are trained on by one, two and four processes on this machine, with one thread each, in turns. The
time is that of the update phase, the median over steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evidence.results import RESULTS, where, write
from nanorlhf.errors import RunError
from nanorlhf.records.directory import read_lines

TINY = ["--recipe", "tiny", "--engine", "hf", "--eval_prompts", "16", "--eval_steps", "0", "--save_steps", "0"]
FED = ["--kl_coef", "0.01", "--whiten_advantages", "on", "--updates_per_step", "2", "--learning_rate", "2e-4"]


def main(argv: list[str] | None = None) -> int:
    """Trains, compares, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="against one (default: 2 4)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each number (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "processes.json", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept"
        run(1, kept, ["--max_steps", str(args.steps)])
        words = [*FED, "--max_steps", str(args.steps), "--rollouts_from", str(kept)]
        turns = [
            {n: run(n, Path(folder) / f"{n}-{turn}", words) for n in (1, *args.processes)} for turn in range(args.turns)
        ]
    found = {"command": f"grpo {' '.join([*TINY, *FED])}", "steps": args.steps}
    found |= {"against one": {str(n): against(turns, n) for n in args.processes}} | where()
    write(args.output, found)
    for n, figures in found["against one"].items():
        print(f"{n} processes: {', '.join(f'{name} {value:.3g}' for name, value in figures.items())}")
    return 0


def run(processes: int, folder: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """The steps of a run of so many processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    line = [*launch, "-m", "nanorlhf", "grpo", *TINY, *words, "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        raise RunError(f"{processes} processes failed: {ended.stderr[-1000:]}")
    return [row for row in read_lines(folder / "metrics.jsonl") if "time/step" in row]


def against(turns: Sequence[dict[int, list[dict[str, Any]]]], processes: int) -> dict[str, float]:
    """The distance of so many processes from one, and the share of its time that an update takes them."""
    one, several = turns[0][1], turns[0][processes]
    times = {n: [median(row["time/update"] for row in turn[n]) for turn in turns] for n in (1, processes)}
    return {
        "first gradient, relative": abs(several[0]["grad_norm"] / one[0]["grad_norm"] - 1),
        "largest difference of a loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(one, several, strict=True)),
        "time of the update, share of one's": median(b / a for a, b in zip(*times.values(), strict=True)),
    }


if __name__ == "__main__":
    sys.exit(main())
