"""The time of a step's parts on a real model, beside its matrix products alone: `python -m evidence.speed.step_times`.

Products are those of the profiler's record of one step, each shape then timed by itself: the update could not be faster
than they are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from evidence.results import RESULTS, where, write
from evidence.speed import ours
from evidence.speed.benchmark import WORKS
from evidence.speed.workloads import Setting, aligned, prepare

PARTS = {
    "rollout": ("time/rollout", "time/reward"),
    "update": ("time/measure", "time/update"),
    "new weights": ("time/sync",),
}
WARM, STEPS, REPEATS = 1, 5, 5

Shape = tuple[tuple[int, int], tuple[int, int]]


def shapes_of(record: Any) -> tuple[Counter[Shape], float]:
    """Products of matrices by their shapes, and the seconds that they took within the step."""
    found, seconds = Counter[Shape](), 0.0
    for event in record.key_averages(group_by_input_shape=True):
        if event.key in {"aten::mm", "aten::addmm_", "aten::addmm"}:
            first, second = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
            found[tuple(first), tuple(second)] += event.count
            seconds += event.self_cpu_time_total / 1e6
    return found, seconds


def alone(shapes: Counter[Shape]) -> float:
    """Seconds of the same products, one after the other, with nothing between."""
    total = 0.0
    for (left, right), count in shapes.items():
        a, b = torch.randn(left), torch.randn(right)
        laps = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            torch.mm(a, b)
            laps.append(time.perf_counter() - start)
        total += count * median(laps)
    return total


def measured(folder: Path, size: str) -> dict[str, Any]:
    """Medians of a few steps, then one under the profiler."""
    work = WORKS["smol_step"][size]
    prepare(folder, work)
    trainer = ours.trainer_of(folder, work, Setting("ours"), WARM + STEPS + 1)
    try:
        steps = [trainer.loop.step(number + 1).metrics for number in range(WARM + STEPS)][WARM:]
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
            trainer.loop.step(WARM + STEPS + 1)
    finally:
        trainer.close()
    shapes, within = shapes_of(record)
    parts = {name: median(sum(step[key] for key in keys) for step in steps) for name, keys in PARTS.items()}
    whole = median(step["time/step"] for step in steps)
    return {
        "step": whole,
        "parts": parts | {"the rest": whole - sum(parts.values())},
        "products_of_the_update": {"count": sum(shapes.values()), "within_the_step": within, "alone": alone(shapes)},
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, writes results/step_times.json, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny only shows that it works")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_times.json", help="default: %(default)s")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, Any] = where() | {"threads": torch.get_num_threads()} | measured(Path(name), options.size)
    write(options.output, found)
    products = found["products_of_the_update"]
    rows = [("a step", found["step"]), *found["parts"].items()]
    rows += [("products of the update, in the step", products["within_the_step"]), ("alone", products["alone"])]
    print("\n".join(aligned([(name, f"{seconds:.3g} s") for name, seconds in rows], names=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
