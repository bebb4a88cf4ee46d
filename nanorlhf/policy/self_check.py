"""A check before training: packed rows against a model's own attention, one sample at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nanorlhf.policy.attention import NAME, UnsupportedModelError, one_per_row
from nanorlhf.policy.logprobs import backbone_hidden, head_of, plain, token_logprobs


@torch.no_grad()
def verify(model: nn.Module) -> None:
    """Refuses a model whose rows do not give, sample by sample, what its own eager attention and LM head give.

    Windows are shortened meanwhile, so that a few dozen tokens reach beyond them. Runs under the caller's autocast.
    """
    base, head = plain(model), head_of(model)
    name, device = base.config.model_type, head.weight.device
    if base.base_model is base:
        raise UnsupportedModelError(f"{name}: no backbone is found below its LM head")
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:  # noqa: SLF001  # transformers only logs that it could not
        raise UnsupportedModelError(f"{name}: its attention cannot be replaced (it does not use AttentionInterface)")
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else head.weight.dtype
    noise = 3 * math.sqrt(torch.finfo(dtype).eps)  # float32: .001 nats a token; bfloat16: .27
    draw = torch.Generator().manual_seed(0)
    first, second, other = (torch.randint(len(head.weight), (n,), generator=draw).to(device) for n in (24, 17, 24))
    with evaluating(model), short_windows(base, 8):
        with eager(base):
            hidden = torch.cat(
                [base.base_model(s[None], use_cache=False).last_hidden_state[0] for s in (first, second)]
            )
            logits = torch.cat([base(s[None], use_cache=False).logits[0] for s in (first, second)])
        targets = torch.cat([first, second]).roll(-1)
        own = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        off = (token_logprobs(hidden, head, targets, 1.0)[0] - own).abs().mean()
        if not off <= noise:
            raise UnsupportedModelError(
                f"{name}: its LM head does more than we know of (log-probabilities {off:.2g} off)"
            )
        try:
            packed, touched = row(model, first, second), row(model, other, second)
        except TypeError as error:
            why = f"it cannot be told where the samples of a row end ({error})"
            if "NoneType" in str(error):
                why = "its layers read the attention mask themselves (to choose tokens by), and packed rows have none"
            raise UnsupportedModelError(f"{name}: {why}") from error
        leak = (packed - touched)[len(first) :].abs().mean() / packed.abs().mean()
        if not leak <= noise:
            raise UnsupportedModelError(f"{name}: a sample changes with the one before it in the row (by {leak:.0%})")
        off = (token_logprobs(packed, head, targets, 1.0)[0] - own).abs().mean()
        if not off <= noise:
            raise UnsupportedModelError(
                f"{name}: packed attention differs from its own (log-probabilities {off:.2g} off)"
            )


def row(model: nn.Module, *samples: Tensor) -> Tensor:
    """Hidden states (T, H) of samples packed as training packs them."""
    rows = [[s] for s in samples] if one_per_row(model) else [list(samples)]
    states = []
    for packed in rows:
        places = [torch.arange(len(s), device=s.device) for s in packed]
        ends = torch.tensor([0, *(len(s) for s in packed)], device=packed[0].device).cumsum(0, dtype=torch.int32)
        states.append(backbone_hidden(model, torch.cat(packed), torch.cat(places), ends))
    return torch.cat(states)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def eager(base: Any) -> Iterator[None]:
    """The model's own attention, for a while."""
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(NAME)


@contextlib.contextmanager
def short_windows(base: nn.Module, size: int) -> Iterator[None]:
    """Sliding windows and attention chunks cut to `size`, for a while."""
    owners = {id(x): x for m in base.modules() for x in (m, getattr(m, "config", None)) if x is not None}.values()
    names = ("sliding_window", "attention_chunk_size")
    windows = [(x, n, w) for x in owners for n in names if isinstance(w := getattr(x, n, None), int) and w > size]
    for owner, name, _ in windows:
        setattr(owner, name, size)
    try:
        yield
    finally:
        for owner, name, window in windows:
            setattr(owner, name, window)
