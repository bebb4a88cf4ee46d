"""Measures that GRPO teaches the shipped counter to take the step it is asked: `python -m evidence.learning.counting`.

Answers have a long tail of lengths, up to eight thousand tokens. A seed that is done is not run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from evidence.learning.commands import command_line, curve, each_seed, parsed, train
from evidence.results import spread

LAST = 10  # steps whose answers' lengths are looked at
TINY = ("--max_steps", "2", "--max_completion_length", "64", "--eval_prompts", "8", "--engine", "hf")


def main(argv: list[str] | None = None) -> int:
    """Runs the seeds that are missing, and prints the table."""
    args = parsed(command_line(__doc__), argv, "counting")
    options = TINY if args.size == "tiny" else ()
    print(table(each_seed(args.output, args.seeds, lambda seed: measure(args.runs / f"seed{seed}", seed, options))))
    return 0


def measure(run: Path, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """One run: held-out rewards on the way, and the lengths of its last answers."""
    train("grpo", "counting", run, ["--seed", str(seed), *options])
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    last = [sample for sample in samples if sample["step"] > samples[-1]["step"] - LAST]
    lengths = [sample["length"] for sample in last]
    right = [sample["length"] for sample in last if sample["reward"] == 1]
    deciles = quantiles(lengths, n=10)
    learned = curve(run)
    ends = [point["reward"] for point in learned["curve"]]
    lengths_of = {
        "length_median": deciles[4],
        "length_ninth_decile": deciles[8],
        "length_longest": max(lengths),
        "right_ninth_decile": quantiles(right, n=10)[8] if len(right) > 1 else None,
        "right_longest": max(right, default=None),
    }
    return learned | {"before": ends[0], "after": ends[-1]} | lengths_of


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Median and range over the seeds."""
    names = ("length_median", "length_ninth_decile", "right_ninth_decile", "right_longest")
    reward = f"{spread(runs, 'before', '.2f')} -> {spread(runs, 'after', '.2f')}"
    cells = [reward, *(spread(runs, name, ",.0f") for name in names), spread(runs, "training_seconds", ",.0f")]
    heads = [
        "seeds",
        "steps",
        "held-out reward",
        "tokens: median",
        "ninth decile",
        "of right ones",
        "longest right",
        "seconds of steps",
    ]
    row = [str(len(runs)), str(runs[0]["steps"]), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), row))


if __name__ == "__main__":
    sys.exit(main())
