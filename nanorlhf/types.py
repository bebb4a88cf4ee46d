"""The types that all modules share. Shapes: S samples, N completion tokens, T row tokens, H hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from nanorlhf.segments import Segments

Progress = Callable[[int], object]  # told how many tokens have just arrived

Text = str | list[dict[str, str]]  # plain text, or chat messages
WeightSync = Literal["lora", "merged"]  # how weights reach an engine


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, ready for the model, with everything else its dataset row held."""

    index: int
    ids: list[int]
    text: Text
    columns: dict[str, Any]
    prefill: str = ""  # what the chat template has opened the answer with, such as "<think>"; rewards see it restored


@dataclass(slots=True)
class Sample:
    """One answer to one prompt; `own` marks the tokens the policy wrote (None: all of them)."""

    prompt: Prompt
    completion_ids: list[int]
    engine_logprobs: list[float]
    stopped: bool
    text: str
    own: list[bool] | None = None
    versions: list[int] | None = None  # of the weights that wrote each token, if those were not the same for all
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    fault: str | None = None  # what a reward died of; such a sample is unscored, whatever others say
    extras: dict[str, Any] = field(default_factory=dict)  # what rewards noted beside their scores
    environment: Any = None  # the other side, in an episode of several turns,
    returned: float | Exception | None = None  # and what its turns earned, or what it died of

    @property
    def trained(self) -> int:
        """The number of its tokens that the loss may touch."""
        return len(self.completion_ids) if self.own is None else sum(self.own)

    @property
    def row_length(self) -> int:
        return len(self.prompt.ids) + len(self.completion_ids)


@dataclass(slots=True)
class Rollout:
    """The data of one step: samples, those of one prompt adjacent, and flat columns `(N,)` as they are measured."""

    samples: list[Sample]
    group: Tensor  # (S,) which prompt of this step
    rewards: Tensor  # (S,) float32, NaN if nothing could score the sample
    written: int = 0  # tokens that were written for it, those of baselines and discarded groups included
    scored: int = 0  # answers that rewards judged for it, counted likewise
    columns: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,)
    baselines: Tensor | None = None  # (S,) rewards of each prompt's greedy sample, if the algorithm asked for one
    figures: dict[str, float] = field(default_factory=dict)  # what its source says of it, for the metrics

    @property
    def lengths(self) -> Tensor:
        """(S,) trained tokens of each sample."""
        return torch.tensor([s.trained for s in self.samples], dtype=torch.long)

    @property
    def sample(self) -> Tensor:
        """(N,) which sample each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.samples)), self.lengths)

    def parts(self, count: int) -> Iterator[Tensor]:
        """(S,) masks that cut it into disjoint sets of whole groups."""
        part = self.group * count // (int(self.group.max()) + 1)
        for i in range(count):
            yield part == i


@dataclass(slots=True)
class Credit:
    """The advantages that an algorithm made of the rewards; no gradient flows here."""

    advantages: Tensor  # (N,)
    keep: Tensor  # (S,) which samples to train on
    returns: Tensor | None = None  # (N,) what a critic should learn


@dataclass(slots=True)
class MicroBatch:
    """Samples end to end in one row, what they share once: no padding, no masks."""

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,) in the sample
    segments: Segments
    predict_at: Tensor  # (N,) the row position whose hidden state predicts each trained token
    targets: Tensor  # (N,)
    sample: Tensor  # (N,) which sample of the rollout, so sequence sums are one scatter
    group: Tensor  # (N,) which prompt of the step
    tokens: Tensor  # (N,) where these tokens lie in the rollout's flat columns
    weights: Tensor  # (N,) each token's share of the loss
    columns: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,)

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`."""
        moved = {k: getattr(self, k).to(device, non_blocking=True) for k in self.__slots__ if k != "columns"}
        return MicroBatch(**moved, columns={k: v.to(device, non_blocking=True) for k, v in self.columns.items()})


@dataclass(slots=True)
class Step:
    """The result of a step."""

    rollout: Rollout
    credit: Credit
    metrics: dict[str, Any]
    skipped: list[SkippedUpdate] = field(default_factory=list)  # updates that were not taken


def as_tensor(samples: Sequence[Sample]) -> Tensor:
    """(S,) rewards, NaN if there is none."""
    return torch.tensor([float("nan") if s.reward is None else s.reward for s in samples])


@dataclass(frozen=True, slots=True)
class SkippedUpdate:
    """An update that was not taken."""

    whose: str  # the policy's or the critic's
    loss: float
    grad_norm: float
    not_finite: dict[str, int]  # measured columns, with how many of their values
    samples: list[dict[str, Any]]

    @property
    def words(self) -> str:
        columns = "".join(f", {count} values of {name}" for name, count in self.not_finite.items())
        return f"the {self.whose}'s update was left out: loss {self.loss:g}, gradient norm {self.grad_norm:g}{columns}"
