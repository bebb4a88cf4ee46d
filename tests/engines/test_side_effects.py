"""A trainer and vLLM's transformers backend in one process: both models are of one of transformers' classes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from nanorlhf.config.training import TrainConfig
from nanorlhf.engines.base import Sampling
from nanorlhf.engines.vllm import VLLMEngine
from nanorlhf.policy.policy import Policy
from nanorlhf.types import WeightSync
from tests.engines.gap import gap
from tests.models import servable

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("sync", ["merged", "lora"])
@pytest.mark.parametrize(("architecture", "first"), [("olmo2", "trainer"), ("smollm3", "engine")])
def test_who_is_built_first_and_how_often_changes_nothing(
    architecture: str, first: str, sync: WeightSync, tmp_path: Path
) -> None:
    name = servable(architecture, tmp_path)
    config = TrainConfig(model_name_or_path=name, device="cpu", lora_r=8)

    def start() -> VLLMEngine:
        return VLLMEngine(name, Sampling(1.0, 16, (2,)), sync=sync, max_model_len=64, lora_rank=8)

    policy = Policy(config) if first == "trainer" else None
    with contextlib.closing(start()) as engine:
        assert engine.engine.apply_model(lambda model: type(model).__name__) == ["TransformersForCausalLM"]
        policy = policy or Policy(config)
        policy.verify()
        hooked = []
        policy.base.model.register_forward_hook(lambda *_: hooked.append(1))
        assert gap(policy, engine) < 1e-5
        assert hooked, "a hook on the trainer's model runs"
    with contextlib.closing(start()) as engine:
        assert gap(policy, engine) < 1e-5
        assert len(hooked) == 2
        assert Policy(config).base.model.__class__ is policy.base.model.__class__
