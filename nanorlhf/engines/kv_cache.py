"""The part of a key-value cache that a completion takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

CPU_CACHE = 2**30  # bytes that the cache on a CPU has at most
CPU_BLOCK = 32  # tokens in a block there: what a group's prompts share is whole blocks


def sequence_bytes(about: PretrainedConfig, dtype: torch.dtype, tokens: int, block: int) -> int:
    """Bytes for one sequence of so many tokens, in whole blocks, with keys and values of every layer that has some."""
    text: Any = about.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["attention"] * text.num_hidden_layers
    layers = sum("attention" in kind and kind != "linear_attention" for kind in kinds)
    return -(-tokens // block) * block * 2 * layers * heads * size * dtype.itemsize


def cpu_cache_bytes(model: str, tokens: int, max_model_len: int, dtype: str, trust_remote_code: bool) -> int:
    """Key-value cache for so many tokens, at most 1 GiB, but always enough for two sequences of full length."""
    about = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    wanted, sequence = (sequence_bytes(about, getattr(torch, dtype), n, CPU_BLOCK) for n in (tokens, max_model_len))
    return max(min(wanted, CPU_CACHE), 2 * sequence)
