"""vLLM as it starts: when memory runs out, and with logits in another precision."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from transformers import AutoConfig

from nanorlhf.config.training import TrainConfig
from nanorlhf.engines.base import Request
from nanorlhf.engines.kv_cache import CPU_BLOCK
from nanorlhf.engines.launch import build_engine
from nanorlhf.engines.restart import Restarting
from nanorlhf.engines.vllm import VLLMEngine
from nanorlhf.grpo import GRPOConfig
from nanorlhf.memory import needs
from nanorlhf.policy.policy import Policy as TrainedPolicy
from tests.engines.test_vllm import ADDER, TOKENIZER, WARM, Policy, gap, requests

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_an_engine_whose_start_ran_out_of_memory_starts_again_with_half_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.worker import gpu_model_runner

    policy = Policy(r=12, target_modules=["q_proj"])
    runner, tries = gpu_model_runner.GPUModelRunner, list[int]()
    allocate = runner.initialize_kv_cache

    def full(self: Any, cache: Any, *args: Any, **options: Any) -> Any:
        tries.append(cache.num_blocks)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(self, cache, *args, **options)

    monkeypatch.setattr(runner, "initialize_kv_cache", full)
    kind = {"sync": "lora", "dtype": "float32", "max_model_len": 200, "lora_rank": 12}
    restarting = Restarting(lambda part: VLLMEngine(ADDER, WARM, part=part, **kind), policy, "runs/mine")  # type: ignore[arg-type]
    with contextlib.closing(restarting):
        assert tries[1] == pytest.approx(tries[0] / 2, abs=1)
        restarting.update(policy)
        done = sorted(restarting.generate(requests(), 0), key=lambda c: c.id)
        assert gap(policy, requests(), done, WARM.temperature) < 1e-4


def test_a_plan_for_one_completion_at_once_is_enough_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "BLOCK", CPU_BLOCK)
    lengths: dict[str, Any] = {"max_prompt_length": 64, "max_completion_length": 64}
    config = GRPOConfig(model_name_or_path=ADDER, dtype="float32", lora_r=12, **lengths)
    one = needs.cached(needs.ModelSize.of(config, AutoConfig.from_pretrained(ADDER)), "vllm")
    engine = VLLMEngine(ADDER, WARM, sync="merged", max_model_len=128, kv_cache_bytes=one)
    with contextlib.closing(engine):
        policy = Policy(r=12, target_modules=["q_proj"])
        engine.update(policy)
        asked = [Request(i, TOKENIZER.encode("1+2=")) for i in range(3)]
        assert len(list(engine.generate(asked, 0))) == 3


@pytest.mark.parametrize("head", ["model", "float32"])
def test_logits_are_rounded_to_16_bits_or_not(head: Literal["model", "float32"], tmp_path: Path) -> None:
    rounded = list[bool]()

    def note(*call: Any) -> None:
        logits = call[-1]
        rounded.append(torch.equal(logits.float(), logits.bfloat16().float()))

    config = TrainConfig(
        model_name_or_path=ADDER,
        engine="vllm",
        dtype="bfloat16",
        head_dtype=head,
        max_prompt_length=100,
        max_completion_length=100,
    )
    engine: Any = build_engine(config, TrainedPolicy(config), TOKENIZER, WARM, tmp_path)
    with contextlib.closing(engine):
        engine.engine.apply_model(lambda model: model.logits_processor.register_forward_hook(note) and None)
        list(engine.generate([Request(0, TOKENIZER.encode("1+2="))], 0))
    assert set(rounded) == {head == "model"}


def test_what_an_engine_that_never_came_up_left_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import convert_frame
    from vllm.device_allocator.cumem import CuMemAllocator
    from vllm.model_executor.layers import rotary_embedding

    from nanorlhf.engines.vllm_leftovers import forget

    pools, hooks, ropes = SimpleNamespace(release_pools=lambda: released.append(True)), {0: print}, {(): print}
    released: list[bool] = []
    monkeypatch.setattr(CuMemAllocator, "instance", pools)
    monkeypatch.setattr(convert_frame, "_bytecode_hooks", hooks)
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", ropes)
    forget()
    assert (hooks, ropes, released) == ({}, {}, [True])
