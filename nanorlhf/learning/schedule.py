"""The course of the learning rate."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from nanorlhf.config.training import TrainConfig


def schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Warm-up, then cosine to `lr_min_ratio`, linear to nothing, or constant, over the whole run."""
    names = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup", "linear": "linear"}
    made = get_scheduler(
        names[config.lr_scheduler_type],
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps * config.updates * config.epochs,
        scheduler_specific_kwargs={"min_lr_rate": config.lr_min_ratio}
        if config.lr_scheduler_type == "cosine"
        else None,
    )
    assert isinstance(made, LambdaLR), "all of these are"
    return made
