"""AdamW, whose step is whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import RunError
from nanorlhf.learning.passes import HELP
from nanorlhf.learning.schedule import schedule
from nanorlhf.system.device import ran_out
from nanorlhf.system.distributed import world

FUSED = ("cuda",)  # devices on which a step is one pass in place, with nothing to make room for


class Optimizer:
    """One optimizer step from the gradients there are: clipped, taken, scheduled, cleared."""

    def __init__(
        self,
        config: TrainConfig,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        device: torch.device,  # on which steps are taken; the parameters may be away from it now
    ) -> None:
        self.parameters, self.max_norm = list(parameters), config.max_grad_norm
        betas = (config.adam_beta1, config.adam_beta2)
        fused = device.type in FUSED or None
        self.adam = torch.optim.AdamW(
            self.parameters, learning_rate, betas, weight_decay=config.weight_decay, fused=fused
        )
        self.scheduler = schedule(config, self.adam)

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def step(self, loss: float = 0.0) -> tuple[float, float]:
        """Loss and gradient's norm before clipping, of all processes; unsound ones, or none, leave the parameters."""
        try:
            return self.step_together(loss)
        except RuntimeError as error:
            if world().size > 1 and ran_out(error):  # the others do not begin again with this one
                raise RunError(
                    f"out of memory (optimizer step), where all processes must go on together; {HELP}"
                ) from error
            raise

    def step_together(self, loss: float) -> tuple[float, float]:
        """The same, by all processes at once."""
        loss = world().sum_gradients(self.parameters, loss)
        norm = torch.as_tensor(nn.utils.clip_grad_norm_(self.parameters, self.max_norm)).item()
        if sound(loss, norm):
            self.take()
            self.scheduler.step()
        self.clear()
        return loss, norm

    def take(self) -> None:
        """Adam's step, whole or not at all; if it broke off in the middle there is no going on."""
        known, changes = set(self.adam.state), self.changes()
        try:
            self.adam.step()
        except RuntimeError as error:
            halfway = self.changes() != changes  # a fused step counts itself in `step` before it writes anything else
            for p in self.adam.state.keys() - known:
                del self.adam.state[p]  # made just now, and perhaps not to the end
            if halfway:
                raise RuntimeError(
                    "an optimizer step broke off in the middle, so the weights are neither the old nor the new ones; "
                    "go on from the last checkpoint with --resume"
                ) from error
            raise
        # A fused step's writes are not counted by autograd, and code that keeps copies goes by that count.
        torch.autograd.graph.increment_version([*self.parameters, *self.moments()])

    def moments(self) -> list[torch.Tensor]:
        """The tensors in which it keeps past gradients."""
        return [t for state in self.adam.state.values() for t in state.values() if isinstance(t, torch.Tensor)]

    def changes(self) -> int:
        """Counts how often parameters and their moments have been written to."""
        return sum(t._version for t in [*self.parameters, *self.moments()])  # noqa: SLF001  # autograd's count, of which there is no other reader

    def clear(self) -> None:
        """Forgets the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        """The state that a resumed run must know."""
        return {"adam": self.adam.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Takes back what `state_dict` gave; learning rate, decay and betas are those of now."""
        (highest,), (shape,) = self.scheduler.base_lrs, self.scheduler.lr_lambdas
        rate = highest * shape(state["scheduler"]["last_epoch"])
        self.adam.load_state_dict(state["adam"] | {"param_groups": self.adam.state_dict()["param_groups"]})
        self.adam.param_groups[0]["lr"] = rate
        self.scheduler.load_state_dict(state["scheduler"] | {"base_lrs": [highest], "_last_lr": [rate]})


def sound(loss: float, norm: float) -> bool:
    """Whether an update has a loss and a gradient that are numbers, without which it is not taken."""
    return math.isfinite(loss) and math.isfinite(norm)
