"""Anything that gives a step its rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from nanorlhf.records.metrics import Clock
from nanorlhf.system.distributed import world
from nanorlhf.types import Progress, Rollout, Sample


class Source(Protocol):
    """The source of a step's samples."""

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """The samples of step `step`, counted from 1; the same ones each time it is asked."""
        ...


def shared(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of all processes; the other side of an episode, which has had its say, stays where it is."""
    if world().size == 1:
        return list(samples)
    return world().concat([replace(sample, environment=None, returned=None) for sample in samples])
