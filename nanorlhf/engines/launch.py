"""Starts the engine that writes completions: vLLM if it is installed, else transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.engines.base import CacheBudget, Engine, Sampling
from nanorlhf.errors import UsageError
from nanorlhf.policy import serialization
from nanorlhf.policy.attention import has_flash
from nanorlhf.policy.policy import Policy
from nanorlhf.system import gpu_memory
from nanorlhf.system.terminal import log
from nanorlhf.types import WeightSync

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # what configs call their number


def engine_name(config: TrainConfig) -> str:
    """The engine that this configuration means on this machine."""
    if config.engine != "auto":
        return config.engine
    return "vllm" if importlib.util.find_spec("vllm") else "hf"


def check_engine(config: TrainConfig, about: PretrainedConfig) -> None:
    """Refuses vLLM if it is not there, or too old, or cannot take weights in the way that is asked for."""
    vllm = engine_name(config) == "vllm"
    config.require(vllm or config.head_dtype == "model", "head_dtype", "float32 is for engine vllm")
    if not vllm:
        return
    if not importlib.util.find_spec("vllm"):
        raise UsageError("engine='vllm': vLLM is not installed; `nanorlhf install` brings it, or use engine hf")
    from nanorlhf.engines.vllm import check_version

    if untried := check_version():
        log.warning(untried)
    wide = config.dtype == "float32" and torch.cuda.is_available()
    older = torch.cuda.is_available() and not wide and not has_flash(torch.device("cuda"))
    config.require(not older, "dtype", "vLLM has no bfloat16 on a card from before Ampere; use float32, or engine hf")
    config.require(
        not (wide and config.weight_sync == "lora"), "weight_sync", "vLLM's adapters on CUDA are 16-bit; use merged"
    )
    served = not (config.weight_sync == "lora" and lacks_adapters(about))
    config.require(served, "weight_sync", "vLLM has no adapters on a CPU for models with experts; use merged")


def lacks_adapters(about: PretrainedConfig) -> bool:
    """Whether vLLM cannot serve an adapter of this model here: with one, experts need Triton."""
    text = about.get_text_config()
    experts = any(getattr(text, name, None) not in (None, 0, 1) for name in EXPERTS)
    return experts and not torch.cuda.is_available()


def sync_way(config: TrainConfig, policy: Policy) -> WeightSync:
    """The adapter itself for 16-bit weights, for merging would round small updates away; else merged weights."""
    if config.weight_sync != "auto":
        return config.weight_sync
    half = policy.has_adapter and policy.compute_dtype != torch.float32
    slow = engine_name(config) == "vllm" and not torch.cuda.is_available()  # 7 times, with vLLM's adapters on a CPU
    return "lora" if half and not slow else "merged"


def build_engine(
    config: TrainConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    base_folder: Path,
    cache: CacheBudget | None = None,
    part: float = 1.0,
    cache_tokens: int | None = None,
) -> Engine:
    """The engine, started, with this part of the cache that was planned, or of what is free of a GPU.

    On a CPU nothing is planned, and the cache is for so many tokens.
    A model that came as an object is written to `base_folder` for vLLM to load.
    """
    sync = sync_way(config, policy)
    if engine_name(config) == "hf":
        from nanorlhf.engines.hf import BATCH, HFEngine

        rows = cache.part(part).sequences if cache else int(BATCH * part)
        return HFEngine(policy, tokenizer, sampling, sync, policy.device, rows)
    from nanorlhf.engines.vllm import VLLMEngine

    name = shipped_model(config.model_name_or_path)
    if policy.came_as_object:
        serialization.save_base(policy, base_folder)
        tokenizer.save_pretrained(base_folder)
        name = str(base_folder)
    return VLLMEngine(
        name,
        sampling,
        sync=sync,
        dtype=str(policy.compute_dtype).removeprefix("torch."),
        max_model_len=config.max_prompt_length + config.max_completion_length,
        lora_rank=policy.lora_rank,
        seed=config.seed,
        gpu_memory_utilization=free_share(),
        kv_cache_bytes=cache.part(part).bytes if cache else None,
        part=part,
        cache_tokens=cache_tokens,
        head_dtype=config.head_dtype,
        sleep=cache is not None and cache.sleeps,
        verbose=config.engine_logs,
        trust_remote_code=config.trust_remote_code,
        **({"max_num_seqs": cache.part(part).at_once} if cache else {}),
    )


def free_share() -> float:
    """Nine tenths of what is left of the GPU, as a share of all; if a plan sizes the cache, vLLM only looks whether
    so much is there."""
    if not torch.cuda.is_available():
        return 0.5
    return 0.9 * gpu_memory.left() / torch.cuda.mem_get_info()[1]
