"""A layer on a card in numbers: what it launches, moves and keeps, found on tensors without memory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cuda_on_cpu import card

if __name__ == "__main__":
    card.insert(card.build(shutil.which("g++") or "c++", Path(sys.argv[1])))

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from nanorlhf.grpo import GRPOConfig
from nanorlhf.memory.activation_sizes import Living, skeleton
from nanorlhf.policy import attention
from nanorlhf.policy.logprobs import plain
from nanorlhf.segments import Segments
from tests.cuda_on_cpu.kernels import Watch

QWEN_1_5B = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 32768,
}  # fmt: skip


def as_peft_does(model: nn.Module) -> None:
    """Each adapted layer by its own forward again."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            vars(module).pop("forward", None)


def layer_costs(prepare: Callable[[nn.Module], Any], tokens: int = 10_448, rank: int = 64) -> dict[str, int]:
    """A layer of Qwen2.5-1.5B with LoRA under autocast, there and back; `prepare` may change the model first."""
    one, two = (stack_costs(prepare, layers, tokens, rank) for layers in (1, 2))
    return {name: two[name] - one[name] for name in one}


def stack_costs(prepare: Callable[[nn.Module], Any], layers: int, tokens: int, rank: int) -> dict[str, int]:
    """The same of so many layers, and of what is around them."""
    config = GRPOConfig(model_name_or_path="x", device="cuda", lora_r=rank, lora_alpha=rank)
    model: Any = skeleton(config, AutoConfig.for_model("qwen2", num_hidden_layers=layers, **QWEN_1_5B)).eval()
    with FakeTensorMode(), torch.device("cuda"):
        for module in model.modules():
            for name, p in module._parameters.items():  # noqa: SLF001  those of `meta` cannot be moved
                there = None if p is None else nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                module._parameters[name] = there  # noqa: SLF001
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(b.shape, dtype=b.dtype))
        plain(model).set_attn_implementation(attention.NAME)
        prepare(model)
        ids, segments = torch.zeros(1, tokens, dtype=torch.long), Segments.of([(tokens, [0])]).to(torch.device("cuda"))
        row = {"input_ids": ids, "position_ids": ids, "attention_mask": {"full_attention": None}}
        known = [*model.parameters(), *model.buffers(), ids, segments.ends, segments.seen_ends]
        with Watch() as watch, Living(known) as living:
            with torch.autocast("cuda", torch.bfloat16):
                out = plain(model).base_model(**row, use_cache=False, segments=segments).last_hidden_state
            kept = living.now
            out.backward(torch.ones_like(out))
    return {"kernels": sum(watch.seen["kernels"].values()), "elementwise_bytes": watch.bytes, "bytes_kept": kept}


def both() -> dict[str, dict[str, int]]:
    """By the one function, and by PEFT's forward."""
    return {"one function": layer_costs(lambda model: model), "PEFT": layer_costs(as_peft_does)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(both(), indent=1) + "\n")
