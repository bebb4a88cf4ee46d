"""An update whose numbers were not finite: what there is to know of it, kept as a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from nanorlhf.system.files import write_whole
from nanorlhf.types import Rollout, SkippedUpdate

FOLDER = "faults"
MOST = 64  # samples that a report shows
IN_A_ROW = 3  # so many, and the run ends


def describe(whose: str, loss: float, grad_norm: float, rollout: Rollout, chosen: Tensor) -> SkippedUpdate:
    """The fault of an update of `chosen (S,)`: the samples with a value that is no number, or else all of them."""
    broken = {name: ~column.isfinite() & chosen[rollout.sample] for name, column in rollout.columns.items()}
    counts = {name: int(where.sum()) for name, where in broken.items() if where.any()}
    suspects = {int(i) for where in broken.values() for i in rollout.sample[where]}
    listed = sorted(suspects) or chosen.nonzero().flatten().tolist()
    samples = [rollout.samples[i] for i in listed[:MOST]]
    rows = [
        {
            "index": s.prompt.index,
            "prompt": s.prompt.text,
            "completion": s.text,
            "reward": s.reward,
            "length": s.trained,
        }
        for s in samples
    ]
    return SkippedUpdate(whose, loss, grad_norm, counts, rows)


def keep(run: Path, step: int, faults: list[SkippedUpdate]) -> Path:
    """Writes what went wrong in a step."""
    path = run / FOLDER / f"step_{step:06d}.json"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps([asdict(fault) for fault in faults], indent=1, ensure_ascii=False, default=str) + "\n")
    return path
