"""AdamW and the course of its learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from nanorlhf.options import TrainConfig


class Optimizer:
    """One optimizer step from the gradients there are: clipped, taken, scheduled, cleared."""

    def __init__(self, config: TrainConfig, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
        self.parameters, self.max_norm = list(parameters), config.max_grad_norm
        betas = (config.adam_beta1, config.adam_beta2)
        self.adam = torch.optim.AdamW(self.parameters, learning_rate, betas, weight_decay=config.weight_decay)
        self.scheduler = schedule(config, self.adam)

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def step(self) -> float:
        """The gradient's norm before clipping; without a gradient the parameters stay as they are."""
        norm = torch.as_tensor(nn.utils.clip_grad_norm_(self.parameters, self.max_norm)).item()
        self.adam.step()
        self.scheduler.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, object]:
        """What a resumed run must know."""
        return {"adam": self.adam.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Takes back what `state_dict` gave."""
        self.adam.load_state_dict(state["adam"])
        self.scheduler.load_state_dict(state["scheduler"])


def schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Warm-up, then cosine to `lr_min_ratio`, linear to nothing, or constant, over the whole run."""
    names = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup", "linear": "linear"}
    return get_scheduler(
        names[config.lr_scheduler_type],
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps * config.updates * config.epochs,
        scheduler_specific_kwargs={"min_lr_rate": config.lr_min_ratio}
        if config.lr_scheduler_type == "cosine"
        else None,
    )
