"""Memory and time of an update and of a rollout against the length of answers: `python -m evidence.speed.lengths`.

A small model on the CPU, answers that are all of one length, each length in a process of its own. The memory of an
update should lie on a straight line; attention makes its time a little more than that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evidence.results import RESULTS, where, write
from evidence.speed import ours
from evidence.speed.workloads import Meter, Run, Setting, Workload, aligned, prepare
from nanorlhf.engines.base import Request, Sampling

LENGTHS = {"full": (1024, 2048, 4096, 8192), "tiny": (16, 64)}
STRAIGHT = 0.1  # of the largest, by which a length may lie beside the line through the shortest and the longest
GROUP = 4


def workload(size: str, length: int) -> Workload:
    """One group whose answers are all of this length."""
    shape: dict[str, Any] = {"hidden": 64, "intermediate": 176, "layers": 2, "heads": 2, "vocabulary": 8192}
    shape |= {"vocabulary": 64} if size == "tiny" else {}
    return Workload(**shape, prompts=1, generations=GROUP, median_length=length, sigma=0.0, longest=length, kl=0.0)


def update(folder: Path, work: Workload) -> Run:
    """An update in one row of one answer after the other, as it is on any card that is full."""
    return ours.update(folder, work, work.rollout())


def rollout(folder: Path, work: Workload) -> Run:
    """A rollout of which every answer is written to the limit, by vLLM if it is there."""
    meter = Meter()
    trainer = ours.trainer_of(folder, work, Setting("ours"), 1)
    prompt = trainer.prompts.batch(0, 1)[0].ids
    try:
        meter.start()
        asked, endless = [Request(i, prompt) for i in range(GROUP)], Sampling(1.0, work.limit, ())
        tokens = sum(len(completion.token_ids) for completion in trainer.engine.generate(asked, 0, endless))
        return meter.stop() | {"tokens": tokens, "engine": trainer.engine.name}
    finally:
        trainer.close()


PARTS = {"update": update, "rollout": rollout}


def one(part: str, size: str, length: int) -> Run:
    """A part at one length, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        words = [sys.executable, "-m", "evidence.speed.lengths", "--size", size, "--one", part, str(length), name]
        subprocess.run(words, check=True)
        return json.loads((Path(name) / "measured.json").read_text())


def beside_the_line(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The furthest that a value lies from the line through the first and the last, as a share of the last."""
    slope = (values[-1] - values[0]) / (lengths[-1] - lengths[0])
    away = [abs(v - values[0] - slope * (n - lengths[0])) for n, v in zip(lengths, values, strict=True)]
    return max(away) / values[-1]


def main(argv: list[str] | None = None) -> int:
    """Measures, writes results/lengths.json, prints a table; gives 1 if the update's memory is no straight line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=LENGTHS, default="full", help="tiny only shows that it works")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "lengths.json", help="default: %(default)s")
    parser.add_argument("--one", nargs=3, metavar=("PART", "LENGTH", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        part, length, name = options.one
        work = workload(options.size, int(length))
        prepare(Path(name), work)
        (Path(name) / "measured.json").write_text(json.dumps(PARTS[part](Path(name), work)))
        return 0
    lengths, rows = LENGTHS[options.size], []
    for length in lengths:
        row: dict[str, Any] = {"tokens": length}
        for part in PARTS:
            runs = [one(part, options.size, length) for _ in range(options.repeats)]
            row[f"{part}_seconds"] = median(run["seconds"] for run in runs)
            row[f"{part}_mib"] = median(run["peak_mib"] - run["baseline_mib"] for run in runs)
        rows.append(row)
    away = {name: beside_the_line(lengths, [row[name] for row in rows]) for name in rows[0] if name != "tokens"}
    straight = away["update_mib"] <= STRAIGHT
    found = where() | {"size": options.size, "rows": rows, "beside_the_line": away, "straight": straight}
    write(options.output, found)
    cells = [[f"{row[name]:,.3g}" if name != "tokens" else f"{row[name]:,}" for name in row] for row in rows]
    print("\n".join(aligned([list(rows[0]), *cells], names=False)))
    print("beside the line: " + ", ".join(f"{name} {share:.0%}" for name, share in away.items()))
    return 0 if straight else 1


if __name__ == "__main__":
    sys.exit(main())
