"""Of a model's dropout and noise only LoRA's own is at work in updates, whether layers are recomputed or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanorlhf.grpo import GRPO, GRPOConfig, GRPOTrainer
from nanorlhf.learning.critic import Critic
from nanorlhf.learning.packing import pack
from nanorlhf.loop import Loop
from nanorlhf.policy.policy import Policy
from nanorlhf.policy.sharding import layers_of
from nanorlhf.ppo import PPO, PPOConfig
from nanorlhf.types import MicroBatch
from tests.models import tiny
from tests.samples import rollout, sample, updated
from tests.test_trainer import small

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT adapts to GPT-2 by itself

NOISY: dict[str, dict[str, Any]] = {
    "opt": {"dropout": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32},  # its layers drop out by their own `training`
    "seed_oss": {"residual_dropout": 0.5, "attention_dropout": 0.5},
    "gpt2": {"n_positions": 256},  # .1 by default
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
}


def noisy(architecture: str, **options: Any) -> Policy:
    options = {"lora_r": 4, "device": "cpu"} | options
    policy = Policy(GRPOConfig(**options), tiny(architecture, **NOISY[architecture]))
    torch.manual_seed(0)
    for p in policy.trainable.values():
        p.data += 0.02 * torch.randn(p.shape)
    return policy


def batch() -> MicroBatch:
    step = rollout([sample(3 + i, 5 + i, seed=i) for i in range(3)])
    return next(pack(step, torch.ones(3, dtype=torch.bool), torch.ones(int(step.lengths.sum())), 1000))


def gradients(policy: Policy) -> list[Tensor]:
    torch.manual_seed(1)
    policy.logprobs(batch())[0].sum().backward()
    return [p.grad for p in policy.trainable.values() if p.grad is not None]


def count_calls(layers: list[Any]) -> list[nn.Module]:
    """Every run of a layer's attention or norms, as they come."""
    seen: list[nn.Module] = []
    for layer in layers:
        next(iter(layer.children())).register_forward_hook(lambda module, *_: seen.append(module))
    return seen


@pytest.mark.parametrize("lora", ["all-linear", "none"])
@pytest.mark.parametrize("architecture", ["opt", "seed_oss", "gpt2"])
def test_updates_compute_what_the_engine_serves_recomputed_or_not(architecture: str, lora: str) -> None:
    plain = noisy(architecture, lora=lora, gradient_checkpointing=False)
    with torch.no_grad():
        served = plain.logprobs(batch())[0]
    expected = gradients(plain)
    for offload in (None, "off", "on"):
        again = {"gradient_checkpointing": offload is not None, "activation_offload": offload or "auto"}
        policy = noisy(architecture, lora=lora, **again)
        runs = count_calls(layers_of(policy.base))
        with policy.training():
            assert policy.logprobs(batch())[0].equal(served)
            runs.clear()
            found = gradients(policy)
        assert len(runs) == len(layers_of(policy.base)) * (1 if offload is None else 2)
        assert len(found) == len(expected) > 4 and all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_a_router_is_not_jittered() -> None:
    policy = noisy("phimoe", lora="q_proj,v_proj")
    with torch.no_grad(), policy.training():
        assert policy.logprobs(batch())[0].equal(policy.logprobs(batch())[0])


def test_lora_drops_out_in_updates_only_and_the_same_when_recomputed() -> None:
    plain, again = (noisy("opt", lora_dropout=0.5, gradient_checkpointing=g) for g in (False, True))
    with torch.no_grad():
        served = plain.logprobs(batch())[0]
        with plain.training():
            assert not plain.logprobs(batch())[0].equal(served)
        assert plain.logprobs(batch())[0].equal(served)
    with plain.training(), again.training():
        pairs = zip(gradients(plain), gradients(again), strict=True)
        assert all(a.equal(b) for a, b in pairs)


@pytest.mark.parametrize("critic", [False, True])
def test_at_no_learning_rate_no_token_is_clipped_in_a_second_epoch(critic: bool) -> None:
    options = {"lora_r": 4, "device": "cpu", "epochs_per_step": 2, "learning_rate": 1e-9, "num_generations": 4}
    make: Callable[..., Any] = PPOConfig if critic else GRPOConfig
    config = make(**options)
    policy = Policy(config, tiny("gpt2", resid_pdrop=0.5))
    algorithm = PPO(config) if critic else GRPO(config)
    loop = Loop(config, algorithm, policy, None, critic=Critic(config, policy) if critic else None)  # type: ignore[arg-type]
    step = rollout([sample(3 + i % 4, 4 + 3 * i, seed=i) for i in range(16)], group_size=4)
    everyone = torch.ones(16, dtype=torch.bool)
    loop.measure(step, everyone)
    step.columns["engine_logprobs"] = step.columns["old_logprobs"].clone()
    metrics = updated(loop, step, loop.algorithm.credit(step), everyone)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["mismatch/max_abs"] < 1e-4


def test_dropout_is_not_taken_for_a_stale_engine(tmp_path: Path) -> None:
    """Old log-probabilities of an update's own pass have it; those for several updates are measured without."""
    for updates, measured in ((1, False), (2, True)):
        more: dict[str, Any] = {"lora_dropout": 0.3, "updates_per_step": updates, "max_steps": 2}
        history = GRPOTrainer(args=GRPOConfig(**small(tmp_path / str(updates)) | more)).train()
        gaps = [row["mismatch/mean_abs"] for row in history[1:]]
        assert [gap is not None for gap in gaps] == [measured] * 2
        assert all(gap < 1e-4 for gap in gaps if gap is not None)
