"""Which engine, and how weights reach it."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from nanorlhf.config.training import TrainConfig
from nanorlhf.engines.launch import check_engine, sync_way
from nanorlhf.errors import UsageError
from nanorlhf.policy.attention import has_flash
from nanorlhf.policy.policy import Policy
from tests.models import tiny

FEW = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_adapters_are_merged_for_vllm_on_a_cpu(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot serve those of models with experts there, and others cost much time."""
    model = tiny(architecture, **FEW)
    options = {"engine": "vllm", "device": "cpu", "lora_r": 4, "dtype": "bfloat16"}
    with pytest.raises(UsageError, match=r"weight_sync='lora' .* for models with experts; use merged"):
        check_engine(TrainConfig(**options, weight_sync="lora"), model.config)  # type: ignore[arg-type]
    auto = TrainConfig(**options)  # type: ignore[arg-type]
    check_engine(auto, model.config)
    assert sync_way(auto, Policy(auto, model)) == "merged"
    dense = tiny("qwen3")
    check_engine(TrainConfig(**options, weight_sync="lora"), dense.config)  # type: ignore[arg-type]
    half, full = Policy(auto, dense), Policy(replace(auto, dtype="auto"), tiny("qwen3"))
    assert sync_way(auto, half) == "merged"
    without = TrainConfig(**options | {"engine": "hf"})  # type: ignore[arg-type]
    assert (sync_way(without, half), sync_way(without, full)) == ("lora", "merged")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert (sync_way(auto, half), sync_way(auto, full)) == ("lora", "merged")


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True)])
def test_a_card_without_bfloat16_is_told_of_before_the_model_loads(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    about = tiny("qwen3").config
    has_flash.cache_clear()
    with contextlib.nullcontext() if runs else pytest.raises(UsageError, match="use float32, or engine hf"):
        check_engine(TrainConfig(engine="vllm"), about)
    check_engine(TrainConfig(engine="vllm", dtype="float32"), about)
    check_engine(TrainConfig(engine="hf"), about)
    has_flash.cache_clear()


def test_the_precision_of_logits_is_an_option_of_vllm_alone() -> None:
    with pytest.raises(UsageError, match=r"head_dtype.*float32 is for engine vllm"):
        check_engine(TrainConfig(engine="hf", head_dtype="float32"), tiny("qwen3").config)
