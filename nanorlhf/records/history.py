"""The few figures that a run still needs of its past steps; all of them are in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nanorlhf.records.console import HELD_OUT, TRAINING
from nanorlhf.records.diagnosis import FEW, WINDOW
from nanorlhf.records.directory import training_seconds

DRAWN = ("step", *TRAINING, *HELD_OUT, "time/step", "tokens/rollout", "tokens/trained", "memory/peak_gib")
FIRST, LAST = FEW + 1, WINDOW + 2  # rows that tell whether the newest is sick, and whether the one before it was


class History:
    """The steps so far: a few figures of each, and all of those by which a new one is judged."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self.drawn: list[dict[str, Any]] = []
        self.telling: list[dict[str, Any]] = []
        self.seconds = 0.0  # of training
        for row in rows:
            self.append(row)

    def append(self, row: dict[str, Any]) -> None:
        """Takes in a step's metrics."""
        self.drawn.append({name: row[name] for name in DRAWN if name in row})
        self.telling.append(row)
        self.seconds += training_seconds([row])
        if len(self.telling) > FIRST + LAST:
            del self.telling[FIRST]
