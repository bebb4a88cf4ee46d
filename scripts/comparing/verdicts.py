"""Runs side by side: what each came to, at what cost, and which differences are more than noise.

Three figures are compared, each over the seeds of an entry:

- at equal time: the reward after as many training seconds as the shortest run took, so that every run was still going;
- at equal samples: the reward after as many scored completions as the run with the fewest had;
- over the last fifth: the reward up to a run's own last step.

The reward is the held-out one if there is any, else that of training. A single evaluation is noisy (256 prompts at
.95 stray by .014), so each figure is the mean of the curve, straight lines between its points, over the last fifth of
the way up to there; none is a final value. Training seconds are those of steps, and of a critic's value initialisation;
evaluations and starting up are no algorithm's cost. Reward an hour is the last figure less the reward at the start, by
a run's own training time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from nanorlhf.errors import UsageError
from nanorlhf.records.directory import RunRecord
from nanorlhf.records.metrics import PHASES
from nanorlhf.scripts.statistics import holm, shows_from, welch

TAIL = 0.2  # of the way: what a figure is the mean of
LEVEL = 0.05  # how often chance may call equals different, over all pairs
REWARDS = {"eval/reward": "held-out reward", "reward/mean": "training reward"}
FIGURES = {"time": "at equal time", "samples": "at equal samples", "end": "over the last fifth"}
ALL_PHASES = ("value init", *PHASES, "other")


@dataclass(frozen=True, slots=True)
class Run:
    """The part of a run that is kept: its curve, and what it cost."""

    entry: str
    seed: int
    command: str
    reward: str  # the metric that the curve shows
    curve: dict[str, list[float]]  # step, seconds, samples and reward wherever it was measured
    phases: dict[str, float]  # seconds of the whole run
    samples: int  # completions scored
    tokens: int  # written by the policy
    peak_gib: float
    mismatch: float | None  # largest mean of a step between the engine's log-probabilities and the trainer's
    about: dict[str, Any]
    tail: float | None = None  # the share of rollout time in which few sequences decoded, if it was measured

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def end(self) -> float:
        """The reward over the last fifth of its own steps."""
        return level(self.curve["step"], self.curve["reward"], self.curve["step"][-1])

    def costs(self) -> dict[str, float]:
        """Seconds, throughput and memory; throughput is that of steps."""
        stepping = self.seconds - self.phases["value init"]
        costs = {"training seconds": self.seconds, "peak GiB": self.peak_gib}
        rates = {"completions/s": self.samples / self.seconds, "tokens/s": self.tokens / stepping}
        rates["reward an hour"] = 3600 * (self.end - self.curve["reward"][0]) / self.seconds
        writing = self.phases["rollout"]
        costs |= rates | ({"rollout tokens/s": self.tokens / writing} if writing else {})
        return costs | ({"rollout time in the tail": self.tail} if self.tail is not None else {})


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure of two entries: by how much the first is better, and how often chance alone does that."""

    figure: str
    better: str
    worse: str
    by: float
    p: float | None  # corrected for the number of pairs; None: it cannot be tested, for neither entry varies

    @property
    def exceeds_noise(self) -> bool:
        return self.p is not None and self.p < LEVEL


def read(record: RunRecord, entry: str, command: str) -> Run:
    """Gives what is kept of a run that ended."""
    steps, first = record.steps, record.rows[0]
    seconds, samples = first.get("value_init/seconds") or 0.0, first.get("value_init/episodes") or 0
    phases = dict.fromkeys(ALL_PHASES, 0.0) | {"value init": seconds}
    name = next((name for name in REWARDS if any(row.get(name) is not None for row in record.rows)), None)
    if name is None:
        raise UsageError(f"{str(record.folder)!r} has neither {' nor '.join(REWARDS)}, so there is nothing to compare")
    curve: dict[str, list[float]] = {"step": [], "seconds": [], "samples": [], "reward": []}
    for row in record.rows:
        if "time/step" in row:
            spent = {phase: row[f"time/{phase}"] for phase in PHASES}
            for phase, part in (spent | {"other": row["time/step"] - sum(spent.values())}).items():
                phases[phase] += part
            seconds += row["time/step"]
            samples += round(row["throughput/episodes_per_s"] * row["time/step"])
        if row.get(name) is not None:
            for axis, value in zip(curve, (row["step"], seconds, samples, row[name]), strict=True):
                curve[axis].append(value)
    tails = [(row["time/rollout"], t) for row in steps if (t := row.get("throughput/tail_fraction")) is not None]
    mismatches = [m for row in steps if (m := row.get("mismatch/mean_abs")) is not None]
    return Run(
        entry=entry,
        seed=record.options["seed"],
        command=command,
        reward=name,
        curve=curve,
        phases=phases,
        samples=samples,
        tokens=sum(row["tokens/rollout"] or row["tokens/trained"] for row in steps),
        peak_gib=max(row["memory/peak_gib"] for row in steps),
        mismatch=max(mismatches, default=None),
        about=record.about,
        tail=sum(s * t for s, t in tails) / sum(s for s, _ in tails) if tails else None,
    )


def level(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """The mean of a curve of straight lines over the last fifth of the way to `at`."""
    start = (1 - TAIL) * at
    grid = np.array([start, *(point for point in x if start < point < at), at])
    heights = np.interp(grid, x, y)
    return float(np.trapezoid(heights, grid) / (at - start)) if at > start else float(heights[-1])


def shared(runs: Iterable[Run], axis: str) -> float:
    """The least that any run came to."""
    return min(run.curve[axis][-1] for run in runs)


def figures(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Each of the three figures, a value for each run."""
    if len({run.reward for run in runs}) > 1:
        raise UsageError("some runs have a held-out reward and others none, so they cannot be compared")
    ends = {"time": ("seconds", shared(runs, "seconds")), "samples": ("samples", shared(runs, "samples"))}
    found = {
        figure: [level(run.curve[axis], run.curve["reward"], at) for run in runs] for figure, (axis, at) in ends.items()
    }
    return found | {"end": [run.end for run in runs]}


def entries(runs: Iterable[Run]) -> list[str]:
    """Their names, in the order in which they came."""
    return list(dict.fromkeys(run.entry for run in runs))


def grouped(runs: Sequence[Run], values: Sequence[float]) -> dict[str, list[float]]:
    """Values by entry."""
    return {name: [v for run, v in zip(runs, values, strict=True) if run.entry == name] for name in entries(runs)}


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """Every figure of every two entries that have seeds enough to tell; Holm's correction is over a figure's pairs."""
    found: list[Pair] = []
    for figure, values in figures(runs).items():
        by_entry = grouped(runs, values)
        couples = [two for two in itertools.combinations(by_entry, 2) if min(len(by_entry[name]) for name in two) > 1]
        chances = [welch(by_entry[a], by_entry[b]) for a, b in couples]
        corrected = holm([1.0 if chance is None else chance for chance in chances])
        for (a, b), chance, least in zip(couples, chances, corrected, strict=True):
            by, p = fmean(by_entry[a]) - fmean(by_entry[b]), None if chance is None else least
            found.append(Pair(figure, a, b, by, p) if by >= 0 else Pair(figure, b, a, -by, p))
    return found


def verdicts(runs: Sequence[Run]) -> list[str]:
    """Says what may be said of the differences, in plain sentences."""
    counts = [len(values) for values in grouped(runs, [0.0] * len(runs)).values()]
    if len(counts) < 2:
        return ["One entry alone: there is nothing to compare it with."]
    tested = pairs(runs)
    if not tested:
        return ["One seed says nothing of noise, so there is no verdict; --seeds 3 is the least that gives a fair one."]
    number = len(tested) // len(FIGURES)
    lines = [sentence(pair, number) for pair in tested if pair.exceeds_noise]
    lines += [untested(pair) for pair in tested if pair.p is None]
    telling = {pair.figure for pair in tested if pair.exceeds_noise}
    quiet = {pair.figure for pair in tested if pair.p is not None} - telling
    if silent := [words for figure, words in FIGURES.items() if figure in quiet]:
        lines.append(f"No difference exceeds the noise {', nor '.join(silent)}.")
    fewest = min(count for count in counts if count > 1)
    lines.append(
        f"With {fewest} seeds and {number} {'pair' if number == 1 else 'pairs'}, a difference shows from some "
        f"{shows_from(fewest, number, LEVEL):.0f} times what runs of one entry differ by (their standard deviation)."
    )
    if fewest == 2:
        lines.append("Two seeds say little of how much runs differ: what exceeds the noise holds, the rest is open.")
    if 1 in counts:
        lines.append("An entry with one seed has no verdict.")
    return lines


def sentence(pair: Pair, number: int) -> str:
    """A difference in words."""
    assert pair.p is not None
    p = f"p = {pair.p:.2g}" if pair.p >= 1e-4 else "p < .0001"
    correction = f" after correction for {number} pairs" if number > 1 else ""
    return f"{pair.better} is better than {pair.worse} {FIGURES[pair.figure]}: +{pair.by:.3f} ({p}{correction})."


def untested(pair: Pair) -> str:
    """A difference that may be anything, in words."""
    return (
        f"{pair.better} is above {pair.worse} {FIGURES[pair.figure]} by {pair.by:.3f}, but the runs of neither differ "
        "among themselves: without any spread this cannot be tested."
    )


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the standard deviation over the seeds."""
    middle = f"{fmean(values):{form}}"
    return f"{middle} ± {stdev(values):{form}}" if len(values) > 1 else middle


def to_json(run: Run) -> dict[str, Any]:
    """A run as plain values, with no more digits than mean anything."""
    return {key: rounded(value) for key, value in asdict(run).items()}


def rounded(value: Any) -> Any:
    """Five digits of every number with a fraction."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value
