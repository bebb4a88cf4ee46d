"""The part of a key-value cache that a completion takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig


def sequence_bytes(about: PretrainedConfig, dtype: torch.dtype, tokens: int, block: int) -> int:
    """Bytes for one sequence of so many tokens, in whole blocks, with keys and values of every layer that has some."""
    text: Any = about.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["attention"] * text.num_hidden_layers
    layers = sum("attention" in kind and kind != "linear_attention" for kind in kinds)
    return -(-tokens // block) * block * 2 * layers * heads * size * dtype.itemsize
