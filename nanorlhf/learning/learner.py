"""A model that measures and learns from rows: the policy here, the critic beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nanorlhf.algorithm import Algorithm
from nanorlhf.config.training import TrainConfig
from nanorlhf.learning.optimizer import Optimizer, sound
from nanorlhf.learning.passes import Rows
from nanorlhf.policy.loading import drops_out
from nanorlhf.policy.policy import Policy
from nanorlhf.records.metrics import Averages
from nanorlhf.system.device import ran_out
from nanorlhf.system.distributed import world
from nanorlhf.types import MicroBatch

COLUMNS = {"logprobs": ("logprobs", "entropy")}  # measured in one pass


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a rollout that one update learns from."""

    chosen: Tensor  # (S,) samples that pass through the models
    tokens: int  # that these trained
    first: bool  # whether it is the first time that they do


@dataclass(frozen=True, slots=True)
class Learned:
    """One optimizer step: its loss, its gradient's norm before clipping, and the figures so far."""

    loss: float
    grad_norm: float
    averages: Averages


class Learner(ABC):
    """A model with an optimizer."""

    whose: ClassVar[str]
    phase: ClassVar[str]  # what its update is called
    body: Policy  # the model
    optimizer: Optimizer

    @torch.no_grad()
    def measure(self, name: str, rows: Rows, size: int) -> dict[str, Tensor]:
        """(N,) columns of `size` tokens, 0 for those that no process has in its rows."""
        names = COLUMNS.get(name, (name,))
        columns = {n: torch.zeros(size) for n in names}
        for row in rows:
            for n, values in zip(names, self.column(name, row.to(self.body.device)), strict=True):
                columns[n][row.tokens] = values.cpu()
        world().sum(columns.values())
        return columns

    def learn(self, rows: Rows, part: Part, averages: Averages) -> Learned:
        """One optimizer step; its figures are added to `averages`."""
        with self.learning():
            mine = sum(self.backward(row, part, averages) for row in self.on_device(rows))
        return Learned(*self.step(mine, part), averages)

    def on_device(self, rows: Rows) -> Iterator[MicroBatch]:
        """The rows, each brought to the model's device in its turn."""
        return (row.to(self.body.device) for row in rows)

    def step(self, loss: float, part: Part) -> tuple[float, float]:
        """Takes the optimizer step of the gradients that there are, or none if a number is not finite."""
        return self.optimizer.step(loss)

    @abstractmethod
    def learning(self) -> AbstractContextManager[None]:
        """With the model as it learns."""

    @abstractmethod
    def column(self, name: str, row: MicroBatch) -> tuple[Tensor, ...]:
        """(N,) what is measured of a row's tokens."""

    @abstractmethod
    def rehearse(self, row: MicroBatch) -> None:
        """Goes forward and backward as an update does, with a gradient of 0."""

    @abstractmethod
    def backward(self, row: MicroBatch, part: Part, averages: Averages) -> float:
        """Adds a row's gradient and figures; its part of the loss."""


class PolicyLearner(Learner):
    """The policy, which learns by the algorithm's loss."""

    whose, phase = "policy", "update"

    def __init__(self, config: TrainConfig, algorithm: Algorithm, policy: Policy) -> None:
        self.algorithm, self.body, self.drops = algorithm, policy, drops_out(policy.model)
        self.optimizer = Optimizer(config, policy.trainable.values(), config.learning_rate, policy.device)

    def learning(self) -> AbstractContextManager[None]:
        return self.body.training()

    def column(self, name: str, row: MicroBatch) -> tuple[Tensor, ...]:
        """(N,) log-probabilities and entropy of the policy as it is, or log-probabilities of the reference."""
        if name == "logprobs":
            return self.body.logprobs(row)
        with self.body.reference() as model:
            return self.body.logprobs(row, model)[:1]

    def backward(self, row: MicroBatch, part: Part, averages: Averages) -> float:
        logprobs, entropy = self.body.outputs(row, self.algorithm.entropy_grad)
        if not len(row.targets):  # idle: for the others' sake it goes back through the layers
            logprobs.sum().backward()
            return 0.0
        like_engine = "old_logprobs" in row.columns or not self.drops  # dropout is no mismatch
        old = row.columns.setdefault("old_logprobs", logprobs.detach())
        loss = self.algorithm.loss(logprobs, entropy, row)
        weighted = (row.weights * loss.tokens).sum()
        weighted.backward()
        for name, values in {"entropy": entropy, **loss.stats}.items():
            averages.add(name, values)
        if part.first and like_engine and "engine_logprobs" in row.columns:
            gap = (old - row.columns["engine_logprobs"]).abs()
            gap = gap[row.columns["age"] == 0] if "age" in row.columns else gap  # older weights said otherwise
            averages.add("mismatch/mean_abs", gap)
            averages.peak("mismatch/max_abs", gap)
        return weighted.item()

    def rehearse(self, row: MicroBatch) -> None:
        with self.learning():
            logprobs, entropy = self.body.outputs(row, self.algorithm.entropy_grad)
            (0.0 * (logprobs.sum() + entropy.sum())).backward()

    def step(self, loss: float, part: Part) -> tuple[float, float]:
        """Takes the step, and counts it as a version; without a sample that teaches the weights stay as they are."""
        before, teaches = self.body.version, bool(part.chosen.any())
        self.body.version += teaches  # before the step: one that breaks off in the middle is no version to keep
        try:
            total, norm = self.optimizer.step(loss)
        except RuntimeError as error:
            if ran_out(error):  # nothing was changed yet
                self.body.version = before
            raise
        if not sound(total, norm):
            self.body.version = before
        return total, norm

    @torch.no_grad()
    def loss(self, rows: Rows) -> tuple[float, Averages]:
        """The loss of all processes' rows, from which nothing is learned, and what it says of itself."""
        averages, total = Averages(), 0.0
        for row in self.on_device(rows):
            logprobs, entropy = self.body.outputs(row)
            if not len(row.targets):
                continue
            loss = self.algorithm.loss(logprobs, entropy, row)
            total += (row.weights * loss.tokens).sum().item()
            for name, values in loss.stats.items():
                averages.add(name, values)
        return sum(world().gather(total)), averages.gather()
