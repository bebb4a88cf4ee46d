"""Does a comparison find planted differences, and leave planted noise alone?

    python -m evidence.learning.planted_differences

Thirty runs are made once (what is there is not made again): GRPO on the shipped task, and the same with a tenth of its
learning rate. Then three runs are drawn against three others, many times: of the same kind, so that any verdict is
a false one, and of both kinds, so that no verdict is a miss.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence.results import RESULTS, where, write
from nanorlhf.scripts import compare
from nanorlhf.scripts.comparing.publish import read_runs
from nanorlhf.scripts.comparing.verdicts import FIGURES, Run, entries, pairs, verdicts

ENTRIES = ["grpo", "grpo:learning_rate=0.0002"]  # the recipe's rate is ten times that
SIDE = 3  # runs on each side of a comparison


def main(argv: list[str] | None = None) -> int:
    """Makes the runs that are missing, draws, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=15, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=1000, help="comparisons of each kind (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/planted"), help="folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "planted.json", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    words = [*ENTRIES, "--steps", str(args.steps), "--seeds", str(args.seeds), "--engine", "hf", "--save_steps", "0"]
    if code := compare.main([*words, "--output", str(args.runs)]):
        return code
    runs = read_runs(args.runs / "comparison.json")
    found: dict[str, Any] = (
        {"command": f"python -m scripts.compare {' '.join(words)}"} | examined(runs, args.draws) | where()
    )
    write(args.output, found)
    for name, shares in found["called different"].items():
        print(f"{name}: {', '.join(f'{share:.1%} {figure}' for figure, share in shares.items())}")
    return 0


def examined(runs: Sequence[Run], draws: int) -> dict[str, Any]:
    """Counts how often runs are called different, by kind; and the verdicts on the first pair of each."""
    whole, slow = ([run for run in runs if run.entry == name] for name in entries(runs))
    kinds = {
        "GRPO, itself": (whole, whole),
        "a tenth of the learning rate, itself": (slow, slow),
        "GRPO, a tenth of the learning rate": (whole, slow),
    }
    return {
        "draws": draws,
        "runs of each kind": [len(whole), len(slow)],
        "called different": {name: called_different(a, b, draws) for name, (a, b) in kinds.items()},
        "one pair of each": {name: verdicts(two_sides(a[:SIDE], b[SIDE : 2 * SIDE])) for name, (a, b) in kinds.items()},
    }


def called_different(a: Sequence[Run], b: Sequence[Run], draws: int) -> dict[str, float]:
    """The share of draws, three runs of `a` against three others of `b`, in which a figure exceeds the noise."""
    draw, found = random.Random(0), dict.fromkeys(("in any figure", *FIGURES.values()), 0)
    for _ in range(draws):
        left = draw.sample(list(a), SIDE)
        right = draw.sample([run for run in b if run not in left], SIDE)
        telling = {FIGURES[pair.figure] for pair in pairs(two_sides(left, right)) if pair.exceeds_noise}
        for figure in telling | ({"in any figure"} if telling else set()):
            found[figure] += 1
    return {figure: count / draws for figure, count in found.items()}


def two_sides(left: Sequence[Run], right: Sequence[Run]) -> list[Run]:
    """Runs as those of two entries."""
    return [replace(run, entry=side) for side, some in (("one", left), ("other", right)) for run in some]


if __name__ == "__main__":
    sys.exit(main())
