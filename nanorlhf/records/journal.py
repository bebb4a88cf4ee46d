"""The record that a run keeps of itself, step by step; of several processes only the first puts it on a disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import RunError
from nanorlhf.records import diagnosis, directory, rollout_files, skipped_updates
from nanorlhf.records.console import HELD_OUT, TRAINING
from nanorlhf.records.metrics import finite
from nanorlhf.records.plots import draw_png
from nanorlhf.records.tracking import RunLog
from nanorlhf.system.distributed import world
from nanorlhf.system.terminal import log
from nanorlhf.types import Step

DRAWN = ("step", *TRAINING, *HELD_OUT, "time/step", "tokens/rollout", "tokens/trained", "memory/peak_gib")
FIRST, LAST = diagnosis.FEW + 1, diagnosis.WINDOW + 2  # rows that judge the newest, and the one before it


class History:
    """The steps so far: a few figures of each, and all of those by which a new one is judged; the rest is in files."""

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
        self.seconds += directory.training_seconds([row])
        if len(self.telling) > FIRST + LAST:
            del self.telling[FIRST]


class Journal:
    """The history of a run, and the files that it is read from."""

    def __init__(self, run: Path, config: TrainConfig, algorithm: str, done: int, keeps_rollouts: bool) -> None:
        self.run, self.config, self.algorithm, self.keeps_rollouts = run, config, algorithm, keeps_rollouts
        self.history = History(directory.read_metrics(run, done))
        self.tracker: RunLog | None = None
        self.left_out = 0  # updates in a row that were not finite

    def open(self, done: int) -> None:
        """Begins, or goes on after step `done`; what came after it is forgotten."""
        if not world().first:
            return
        for name in (rollout_files.FOLDER, skipped_updates.FOLDER):
            directory.forget_after(self.run / name, done)
        if done:
            self.draw()  # the run may have been killed before it had drawn its last steps
        self.tracker = RunLog(self.run, self.config, self.algorithm, done)

    def settle(self) -> None:
        """Makes sure that what a checkpoint counts on has reached the disk before it."""
        if self.tracker:
            self.tracker.settle()

    def close(self) -> None:
        """Ends the trackers' runs and closes the files."""
        if self.tracker:
            self.tracker.close()
            self.tracker = None

    def record(self, metrics: dict[str, Any]) -> None:
        """Puts metrics into the history and wherever they are tracked; what is no number was not measured."""
        clean = {name: finite(value) for name, value in metrics.items()}
        self.history.append(clean)
        if self.tracker:
            self.tracker.log(clean["step"], clean)

    def write(self, step: Step) -> None:
        """A step's metrics, samples and rollout."""
        self.record(step.metrics)
        if not self.tracker:
            return
        number, ends = step.metrics["step"], step.rollout.lengths.cumsum(0) - 1
        self.tracker.log_samples(number, step.rollout.samples, step.credit.advantages[ends].tolist())
        if self.keeps_rollouts:
            rollout_files.keep(self.run, number, step.rollout, step.credit.advantages)

    def report_skipped(self, step: Step) -> None:
        """Warns of updates that were left out, with a report."""
        if not step.skipped:
            self.left_out = 0
            return
        path = world().first_only(lambda: skipped_updates.keep(self.run, step.metrics["step"], step.skipped))
        taken = step.metrics["loss"] is not None
        self.left_out = 0 if taken else self.left_out + len(step.skipped)
        for fault in step.skipped:
            log.warning(f"{fault.words}; the report is {path}")

    def refuse_the_hopeless(self) -> None:
        """Ends a run of which update after update is left out."""
        if self.left_out >= skipped_updates.IN_A_ROW:
            raise RunError(
                f"{self.left_out} updates in a row had numbers that are not finite; "
                f"see {self.run / skipped_updates.FOLDER} and "
                f"go on from the last checkpoint with --resume {self.run} and a lower learning_rate, or dtype float32"
            )

    def ailments(self) -> list[diagnosis.Diagnosis]:
        """The faults of the last step that the one before it did not have."""
        return diagnosis.begun(self.history.telling)

    def draw(self) -> None:
        """The learning curve."""
        draw_png(self.history.drawn, self.run / "learning_curve.png", self.run.name)
