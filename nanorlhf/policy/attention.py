"""Attention over packed rows: many samples end to end in one row of tokens, none of which sees another's."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from nanorlhf.errors import UsageError
from nanorlhf.policy.logprobs import plain

NAME = "nanorlhf_packed"  # what `attn_implementation` is called
PACKABLE = {"full_attention", "sliding_attention", "chunked_attention"}  # layer types without a memory of their own
GROWING = {"dynamic", "longrope"}  # rotations that depend on the longest sample of the row
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class UnsupportedModelError(UsageError):
    """A model whose packed rows would not give its own log-probabilities."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,  # (1, key-value heads, T, D)
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  # the interface's; ours is None, segments say it all
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: tuple[Tensor, list[int]] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment, (1, T, heads, D); `segments` are their ends and their lengths."""
    if segments is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass on to attention where the samples of a row end"
        )
    cu_seqlens, lengths = segments
    window = sliding_window if sliding_window is not None and sliding_window < max(lengths) else None
    if softcap is None and s_aux is None and not dropout and fits_kernel(query, value):
        return by_kernel(query, key, value, cu_seqlens, max(lengths), scaling, window)[None], None
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        if softcap is None and s_aux is None:
            out = fused(q, k, v, dropout, scaling, window)
        else:
            out = spelled_out(q, k, v, dropout, scaling, window, softcap, s_aux)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def fits_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the variable-length kernel takes them: 16 bits on CUDA, heads it knows, a card that has it."""
    return query.is_cuda and suits_kernel(query, value) and has_flash(query.device)


def suits_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether they would be something for it on a card."""
    half = torch.is_autocast_enabled(query.device.type) or query.dtype in {torch.float16, torch.bfloat16}
    head = query.shape[-1]
    return half and head == value.shape[-1] and head % 8 == 0 and head <= 256


@functools.cache
def has_flash(device: torch.device) -> bool:
    """Whether a card runs flash attention: from Ampere on (AMD's builds carry kernels of their own)."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8


def by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All segments (T, heads, D) in one launch, on CUDA."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))  # norms and rotations may have left float32 behind
    ends, size = cu_seqlens.to(torch.int32), (-1 if window is None else window - 1, 0)  # a window counts its own token
    if not GQA and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=size, **GQA)  # type: ignore[return-value]


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys (columns) each query (row) of one segment sees."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def shared_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for every query head that shares them."""
    times = q.shape[1] // k.shape[1]
    return (k, v) if times == 1 else (k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1))


def fused(q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None) -> Tensor:
    """One segment through SDPA."""
    gqa = q.device.type == "cpu"  # elsewhere shared heads may cost the fast path
    if isinstance(q, FakeTensor):  # for a memory plan, which counts what CUDA would keep
        gqa = bool(GQA) and suits_kernel(q, v)
    if not gqa:
        k, v = shared_heads(q, k, v)
    length = q.shape[2]
    mask = visible(length, window, q.device) if window is not None and window < length else None
    return functional.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
    )


def spelled_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One segment step by step, for capped scores (Gemma 2) and attention sinks (gpt-oss)."""
    k, v = shared_heads(q, k, v)
    length = q.shape[2]
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~visible(length, window, q.device), -torch.inf)
    if sinks is not None:  # one more column, which takes its share and gives nothing
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(-1, -1, length, -1)], dim=-1)
    weights = scores.softmax(-1)[..., :length].to(v.dtype)
    return functional.dropout(weights, dropout) @ v


def no_mask(**_: Any) -> None:
    """Stands where a T x T mask would be built."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, no_mask)


def one_per_row(model: nn.Module) -> bool:
    """Whether samples in one row would touch each other, so that each needs a row to itself."""
    base = plain(model)
    config = base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)}
    layers = set(getattr(config, "layer_types", None) or ())
    return getattr(base, "_is_stateful", False) or not layers <= PACKABLE or bool(kinds & GROWING)
