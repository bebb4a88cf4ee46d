"""Tiny random models by architecture: weights large enough that a mistake in attention shows in nats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64
WINDOW = 8

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

SERVED: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **SLIDING},
    "qwen3": {},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "gemma2": {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **SLIDING},
    "gemma3_text": {"query_pre_attn_scalar": 4, **SLIDING},
    "granite": {"attention_multiplier": 0.5, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        **SLIDING,
    },
}
HYBRID: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}


def tiny(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of `architecture` (transformers' `model_type`), in float32 and evaluation mode."""
    options = {**SERVED, **HYBRID}.get(architecture, {})
    config = AutoConfig.for_model(architecture, **SHAPE | options | changes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def servable(architecture: str, folder: Path, **changes: Any) -> str:
    """A tiny model in a folder, with heads of a size that vLLM for CPUs has a kernel for."""
    heads = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "initializer_range": 0.1}
    tiny(architecture, **heads | changes).save_pretrained(folder)
    return str(folder)


class Exactly(TorchFunctionMode):
    """Keeps float64 where a model would go over to float32: in norms, rotations and softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        narrower = double and (func is Tensor.float or (func is Tensor.to and torch.float32 in args[1:]))
        if narrower:
            return args[0]
        if double and kwargs.get("dtype") == torch.float32:
            del kwargs["dtype"]
        return func(*args, **kwargs)
