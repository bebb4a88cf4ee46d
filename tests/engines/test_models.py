"""Models that vLLM holds otherwise than transformers: what reaches it is what the trainer has."""

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
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 40}


def served(name: str, sync: WeightSync) -> VLLMEngine:
    return VLLMEngine(name, Sampling(1.0, 16, (2,)), sync=sync, max_model_len=64, lora_rank=8)


@pytest.mark.parametrize(
    ("architecture", "lora"),
    [("qwen3_moe", "none"), ("qwen3_moe", "all-linear"), ("mixtral", "none"), ("granitemoe", "all-linear")],
)
def test_experts_reach_vllm(architecture: str, lora: str, tmp_path: Path) -> None:
    name = servable(architecture, tmp_path, **EXPERTS)
    policy = Policy(TrainConfig(model_name_or_path=name, device="cpu", lora=lora, lora_r=8))
    with contextlib.closing(served(name, "merged")) as engine:
        for _ in range(2):
            assert gap(policy, engine) < 1e-5


@pytest.mark.parametrize("sync", ["lora", "merged"])
def test_layers_that_are_one_to_transformers_and_several_to_vllm(sync: WeightSync, tmp_path: Path) -> None:
    name = servable("glm4", tmp_path)
    policy = Policy(TrainConfig(model_name_or_path=name, device="cpu", lora_r=8, lora_alpha=4))
    assert any("gate_up_proj" in adapted for adapted in policy.trainable)
    with contextlib.closing(served(name, sync)) as engine:
        for _ in range(2):
            assert gap(policy, engine) < 1e-5
