"""What is still to come? A value head on a second adapter of the same base, or on a model of its own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanorlhf.losses import clipped_value
from nanorlhf.metrics import Averages
from nanorlhf.optim import Optimizer
from nanorlhf.options import CriticConfig
from nanorlhf.policy import Policy
from nanorlhf.types import MicroBatch

ADAPTER = "critic"


class Critic:
    """Values for every trained token, and their own optimizer."""

    def __init__(self, config: CriticConfig, policy: Policy) -> None:
        self.config, self.shares_base = config, not config.critic_model_name_or_path
        if self.shares_base:
            self.body = policy
            policy.add_adapter(ADAPTER)
        else:
            own = dataclasses.replace(
                config, model_name_or_path=config.critic_model_name_or_path, adapter_name_or_path=None
            )
            self.body = Policy(own)
        self.head = nn.Linear(self.body.base.get_input_embeddings().weight.shape[1], 1)  # type: ignore[arg-type]
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.to(self.body.device)
        with self.active():
            self.weights = self.body.trainable  # by name, the adapter's or the whole model's
        self.optimizer = Optimizer(config, self.parameters, config.critic_learning_rate)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.weights.values(), *self.head.parameters()]

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

    def update(self, batches: Sequence[MicroBatch], averages: Averages) -> None:
        """One optimizer step on the clipped value loss, the mean over tokens."""
        total = sum(len(batch.targets) for batch in batches)
        self.body.model.train()
        with self.active():
            for batch in (b.to(self.body.device) for b in batches):
                values, old, returns = (
                    self.evaluate(self.features(batch)),
                    batch.columns["values"],
                    batch.columns["returns"],
                )
                loss = clipped_value(values, old, returns, self.config.value_clip)
                (loss.sum() / total).backward()
                averages.add("value/loss", loss)
                averages.add("value/error", (old - returns).abs())
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Head, adapter (or model) and optimizer."""
        weights = {name: p.detach().cpu() for name, p in self.weights.items()}
        return {"head": self.head.state_dict(), "weights": weights, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.head.load_state_dict(state["head"])
        for name, parameter in self.weights.items():
            parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
