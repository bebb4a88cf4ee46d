"""The pace of a rollout: how many sequences decoded together in each step of an engine, and for how long."""

from __future__ import annotations

import time

import numpy as np

SLICES = 24  # of a rollout's time, for its picture
FEW = 1 / 4  # of the most that decoded at once: with less the card is hardly used


class Pace:
    """Decode steps since the last `clear`; each wrote a token of every sequence in it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self.seconds: list[float] = []
        self.sequences: list[int] = []
        self.begin()

    def begin(self) -> None:
        """Begins a call of the engine: the time before it does not count."""
        self.last = time.perf_counter()

    def note(self, sequences: int) -> None:
        """Ends a decode step of so many sequences."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.sequences.append(sequences)
        self.last = now

    def metrics(self) -> dict[str, float | list[float]]:
        """The share of the time in which few sequences decoded, how many did on average, and the pace as a curve."""
        seconds, sequences = np.array(self.seconds), np.array(self.sequences, dtype=float)
        whole = seconds.sum()
        if not whole:
            return {}
        tail = seconds[sequences < FEW * sequences.max()].sum()
        return {
            "throughput/tail_fraction": float(tail / whole),
            "throughput/sequences_mean": float(seconds @ sequences / whole),
            "throughput/pace": self.curve(),
        }

    def curve(self) -> list[float]:
        """Tokens/s in equal parts of the time."""
        times, written = (np.cumsum([0, *values]) for values in (self.seconds, self.sequences))
        marks = np.linspace(0, times[-1], SLICES + 1)
        return [round(float(n) / (times[-1] / SLICES), 1) for n in np.diff(np.interp(marks, times, written))]
