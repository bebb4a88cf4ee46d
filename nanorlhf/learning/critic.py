"""Predicts the reward still to come, by a value head on a second adapter of the same base, or on a model of its own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nanorlhf.config.training import CriticConfig
from nanorlhf.formulas.losses import clipped_value
from nanorlhf.learning.learner import Learner, Part
from nanorlhf.learning.optimizer import Optimizer
from nanorlhf.policy.loading import POLICY
from nanorlhf.policy.policy import Policy
from nanorlhf.records.metrics import Averages
from nanorlhf.types import MicroBatch

ADAPTER = "critic"


class Critic(Learner):
    """Values for every trained token, and their own optimizer; it starts from the model that the policy starts from."""

    whose, phase = "critic", "critic"

    def __init__(self, config: CriticConfig, policy: Policy) -> None:
        self.config, self.shares_base = config, config.critic_model_name_or_path is None
        self.body = policy if self.shares_base else own_body(config)
        self.head = value_head(self.body)
        if self.shares_base:
            policy.add_adapter(ADAPTER)
        with self.active():
            self.weights = {f"head.{name}": p for name, p in self.head.named_parameters()} | self.body.trainable
        if self.shares_base:
            self.start_from_policy()
        self.optimizer = Optimizer(config, self.weights.values(), config.critic_learning_rate, self.body.device)

    @torch.no_grad()
    def start_from_policy(self) -> None:
        """The same adapter as the policy's: with what an earlier stage taught it, if there was one."""
        policy = self.body.trainable
        for name, parameter in self.weights.items():
            if not name.startswith("head."):
                parameter.copy_(policy[name.replace(f".{ADAPTER}.", f".{POLICY}.")])

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """With the critic's adapter in place of the policy's; forward and backward both belong inside."""
        with self.body.using(ADAPTER) if self.shares_base else contextlib.nullcontext():
            yield

    def values(self, batch: MicroBatch) -> Tensor:
        """(N,) what is still to come when each token is about to be written."""
        with self.active():
            return self.evaluate(self.features(batch))

    def features(self, batch: MicroBatch) -> Tensor:
        """(N, H) what the head sees; the critic must be active."""
        return self.body.hidden(batch)[batch.predict_at].float()

    def evaluate(self, features: Tensor) -> Tensor:
        """(N,) the head's values."""
        return self.head(features)[:, 0]

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        with self.active(), self.body.training():
            yield

    def column(self, name: str, row: MicroBatch) -> tuple[Tensor, ...]:
        return (self.values(row),)

    def rehearse(self, row: MicroBatch) -> None:
        with self.learning():
            (0.0 * self.evaluate(self.features(row)).sum()).backward()

    def backward(self, row: MicroBatch, part: Part, averages: Averages) -> float:
        """Adds the gradient of the clipped value loss, the mean over the part's tokens."""
        values, old = self.evaluate(self.features(row)), row.columns["values"]
        loss = clipped_value(values, old, row.columns["returns"], self.config.value_clip)
        share = loss.sum() / part.tokens
        share.backward()
        averages.add("value/loss", loss)
        averages.add("value/mean", old)
        return share.item()

    def tensors(self) -> list[Tensor]:
        """The tensors that it does not share with the policy."""
        own = [] if self.shares_base else self.body.tensors()
        return [*self.weights.values(), *own]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of head and adapter (or model)."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.weights.items()}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Takes back what `snapshot` gave."""
        for name, parameter in self.weights.items():
            parameter.copy_(snapshot[name])

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer."""
        return {"weights": self.snapshot(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.restore(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


def own_body(config: CriticConfig) -> Policy:
    """The critic's own model, under the same LoRA options."""
    assert config.critic_model_name_or_path is not None
    own = {"model_name_or_path": config.critic_model_name_or_path, "adapter_name_or_path": None}
    body = Policy(dataclasses.replace(config, **own))
    body.verify()
    return body


def value_head(body: Policy) -> nn.Linear:
    """One number from a hidden state; at first, nothing is expected."""
    head = nn.Linear(body.base.config.get_text_config().hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head.to(body.device)
