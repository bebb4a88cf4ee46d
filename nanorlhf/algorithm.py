"""An algorithm is three decisions: what to sample, what each token earned, and the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nanorlhf.config import Norm, TrainConfig
from nanorlhf.losses import clipped, clipped_surrogate
from nanorlhf.types import Credit, MicroBatch, Rollout

Measure = Literal["logprobs", "ref_logprobs"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to sample for each prompt."""

    samples: int
    greedy: bool = False


@dataclass(slots=True)
class Loss:
    """Per-token loss, and per-token figures to average over the update."""

    tokens: Tensor  # (N,)
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,)


class Algorithm(ABC):
    """The defaults that algorithms share; each overrides what its idea changes."""

    name: ClassVar[str]

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def norm(self) -> Norm:
        return self.config.norm

    @property
    def needs(self) -> set[Measure]:
        """What to measure before credit."""
        return set()

    def plan(self) -> Plan:
        """How many samples, and whether a greedy one too."""
        return Plan(self.config.num_generations)

    def drop(self, rollout: Rollout) -> Tensor:
        """(S,) samples that cannot teach and need no forward pass; they still count in the loss's denominator."""
        return torch.zeros(len(rollout.samples), dtype=torch.bool)

    @abstractmethod
    def credit(self, rollout: Rollout) -> Credit:
        """Rewards and what was measured to each token's advantage."""

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Loss:
        """The clipped surrogate."""
        old, advantages = batch.columns["old_logprobs"], batch.columns["advantages"]
        clip = self.config.clip_range
        cut = clipped(logprobs.detach(), old, advantages, clip)
        return Loss(clipped_surrogate(logprobs, old, advantages, clip), {"clip_fraction": cut})

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
