"""From a configuration to its memory plan: the card's size, the model's config, and what else is on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from nanorlhf.algorithm import Algorithm
from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError
from nanorlhf.memory.choice import make_plan
from nanorlhf.memory.needs import RewardModelSize, needs_of
from nanorlhf.memory.plan import Plan
from nanorlhf.system import gpu_memory


def plan_run(
    config: TrainConfig,
    about: PretrainedConfig,
    algorithm: Algorithm,
    judges: Sequence[RewardModelSize],
    engine: str | None,
    peft_config: Any = None,
) -> Plan:
    """The plan for this card; `engine` is who generates, if anybody."""
    needs = needs_of(config, about, algorithm, peft_config=peft_config, judges=judges, engine=engine)
    budget = None if config.token_budget == "auto" else config.token_budget
    return make_plan(needs, card_bytes(config), config.offload, config.gradient_checkpointing, budget)


def card_bytes(config: TrainConfig) -> int:
    """Bytes of the card that may be used: as many as were said, or as are free."""
    may = gpu_memory.hold(config.gpu_memory_gib)
    if may is None:
        raise UsageError("gpu_memory_gib='auto': there is no GPU here to look at; say how large it is, such as 40")
    return may
