"""Anything that gives a step its rollout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nanorlhf.records.metrics import Clock
from nanorlhf.system.distributed import world
from nanorlhf.types import Progress, Rollout, Sample


class Source(ABC):
    """The source of a step's samples."""

    @abstractmethod
    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """The samples of step `step`, counted from 1; the same ones each time it is asked."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """The state, after this step, that a resumed run must know."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  most have no state
        """Takes back what `state_dict` gave."""


def shared(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of all processes; the other side of an episode, which has had its say, stays where it is."""
    if world().size == 1:
        return list(samples)
    return world().concat([replace(sample, environment=None, returned=None) for sample in samples])
