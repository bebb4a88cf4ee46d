"""A trainer and vLLM's transformers backend in one process: both models are of one of transformers' classes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from nanorlhf.engines.base import Request, Sampling
from nanorlhf.engines.vllm import VLLMEngine
from nanorlhf.options import TrainConfig
from nanorlhf.packing import pack
from nanorlhf.policy import Policy
from nanorlhf.types import Prompt, Sample, WeightSync
from tests.models import VOCABULARY, servable
from tests.samples import rollout

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def gap(policy: Policy, engine: VLLMEngine) -> float:
    """Nats by which the two differ about what the engine writes, with an adapter that is not zero."""
    draw = torch.Generator().manual_seed(policy.version)
    for p in policy.trainable.values():
        p.data += 0.05 * torch.randn(p.shape, generator=draw)
    policy.version += 1
    engine.update(policy)
    asked = [Request(i, torch.randint(3, VOCABULARY, (20 + i,), generator=draw).tolist()) for i in range(6)]
    written = sorted(engine.generate(asked, seed=0), key=lambda c: c.id)
    samples = [
        Sample(Prompt(r.id, r.prompt_ids, "", {}), c.token_ids, c.logprobs, c.stopped, "")
        for r, c in zip(asked, written, strict=True)
    ]
    made = rollout(samples)
    (row,) = pack(made, torch.ones(6, dtype=torch.bool), torch.zeros(int(made.lengths.sum())), 4096)
    with torch.no_grad():
        return (policy.logprobs(row)[0] - row.columns["engine_logprobs"]).abs().max().item()


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
