"""Attention over packed rows: many samples end to end in one row of tokens, which share their prompts' tokens alone."""

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
from nanorlhf.segments import Segments

NAME = "nanorlhf_packed"  # what `attn_implementation` is called
PACKABLE = {"full_attention", "sliding_attention", "chunked_attention"}  # layer types that are not recurrent
GROWING = {"dynamic", "longrope"}  # rotations that depend on the longest sample of the row
AT_ONCE = 1024  # tokens of a prompt and its answers that go through SDPA under one mask; longer ones go piece by piece
MASKED = 512  # queries under one mask, which is as wide as their keys
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
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment and to the prompt that it goes on from, (1, T, heads, D)."""
    if segments is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass on to attention where the samples of a row end"
        )
    longest = max(segments.visible)
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    how = {"dropout": dropout, "scaling": scaling, "window": window}
    if softcap is not None or s_aux is not None:
        attend = functools.partial(spelled_out, softcap=softcap, sinks=s_aux, **how)
    elif not dropout and fits_kernel(query, value):
        return by_kernel(query, key, value, segments, scaling, window)[None], None
    else:
        attend = functools.partial(fused, **how)
    sizes = [segments.common, *(sum(lengths) for lengths in segments.families)]
    (first, *queries), (k_first, *keys), (v_first, *values) = (x.split(sizes, dim=2) for x in (query, key, value))
    outputs = [attend(first, k_first, v_first)] if segments.common else []
    for lengths, q, *own in zip(segments.families, queries, keys, values, strict=True):
        k, v = (torch.cat(x, dim=2) for x in zip((k_first, v_first), own, strict=True)) if segments.common else own
        seen = (segments.common + lengths[0], *lengths[1:])
        if len(lengths) == 1:
            outputs.append(attend(q, k, v))
        elif sum(seen) <= AT_ONCE and not isinstance(q, FakeTensor):
            outputs.append(attend(q, k, v, mask=seen_by(seen, window, q.device)[segments.common :]))
        else:
            (asked, *answers), *inputs = q.split(lengths, dim=2), k.split(seen, dim=2), v.split(seen, dim=2)
            outputs.append(attend(asked, *(x[0] for x in inputs)))
            for i, answer in enumerate(answers, start=1):
                outputs.append(attend(answer, *(torch.cat([x[0], x[i]], dim=2) for x in inputs)))
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1), None


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
    """Whether a card runs flash attention, and bfloat16: from Ampere on (AMD's builds carry kernels of their own)."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8


def by_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """All segments (T, heads, D) in one launch, on CUDA; the last query of each sees up to the last of its keys."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))  # norms and rotations may have left float32 behind
    if segments.seen is not None:
        k, v = k[segments.seen], v[segments.seen]  # a prompt once for each of its answers
    if not GQA and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    ends, longest = (segments.ends, segments.seen_ends), (max(segments.lengths), max(segments.visible))
    size = (-1 if window is None else window - 1, 0)  # a window counts its own token
    return varlen_attn(q, k, v, *ends, *longest, scale=scaling, window_size=size, **GQA)  # type: ignore[return-value]


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys (columns) each of the last queries (rows) of a sample sees."""
    at = torch.arange(keys, dtype=torch.int32, device=device)
    return within(at[keys - queries :, None] - at, window)


def within(back: Tensor, window: int | None) -> Tensor:
    """Which tokens are seen, by how far back they lie: those that are not to come, and not beyond the window."""
    return back >= 0 if window is None else (back >= 0) & (back < window)


@functools.lru_cache(maxsize=32)  # all layers ask the same
def seen_by(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
    """(T, T) which keys each query of a prompt and its answers sees: the prompt's and its own."""
    piece = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    at = torch.cat([torch.arange(n) + lengths[0] * (i > 0) for i, n in enumerate(lengths)])
    mask = ((piece[:, None] == piece) | (piece == 0)) & within(at[:, None] - at, window)
    return mask.to(device, non_blocking=True)


def shared_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for every query head that shares them."""
    times = q.shape[1] // k.shape[1]
    return (k, v) if times == 1 else (k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1))


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    mask: Tensor | None = None,
) -> Tensor:
    """A sample, or the end of one, through SDPA; or what the mask says."""
    counted = isinstance(q, FakeTensor) and suits_kernel(q, v)  # for a memory plan: as the kernel does on a card
    gqa = bool(GQA) and counted if isinstance(q, FakeTensor) else q.device.type == "cpu"  # elsewhere it may be slower
    if not gqa:
        k, v = shared_heads(q, k, v)
    how = {"dropout_p": dropout, "scale": scaling, "enable_gqa": gqa}
    if mask is not None:
        return functional.scaled_dot_product_attention(q, k, v, mask, **how)
    queries, keys = q.shape[2], k.shape[2]
    if counted or (queries == keys and (window is None or window >= keys)):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, **how)
    outputs, seen = [], keys - queries
    for part in q.split(MASKED, dim=2):  # is_causal lets the first query see the first key alone
        seen += part.shape[2]
        first = 0 if window is None else max(0, seen - part.shape[2] + 1 - window)
        near = k[:, :, first:seen], v[:, :, first:seen], visible(part.shape[2], seen - first, window, q.device)
        outputs.append(functional.scaled_dot_product_attention(part, *near, **how))
    return torch.cat(outputs, dim=2)


def spelled_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    mask: Tensor | None = None,
) -> Tensor:
    """The same step by step, for capped scores (Gemma 2) and attention sinks (gpt-oss)."""
    k, v = shared_heads(q, k, v)
    queries, keys = q.shape[2], k.shape[2]
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    seen = visible(queries, keys, window, q.device) if mask is None else mask
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:  # one more column, which takes its share and gives nothing
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(-1, -1, queries, -1)], dim=-1)
    weights = scores.softmax(-1)[..., :keys].to(v.dtype)
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
