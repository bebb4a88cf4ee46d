"""A check before training: packed rows against a model's own attention, one sample at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanorlhf.policy.attention import NAME, UnsupportedModelError, one_per_row
from nanorlhf.policy.logprobs import backbone_hidden, head_of, plain, token_logprobs
from nanorlhf.segments import Segments


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
    sizes = (10, 24, 17, 11, 13, 24, 11)
    start, first, rest, one, two, other, another = (
        torch.randint(len(head.weight), (n,), generator=draw).to(device) for n in sizes
    )
    prompt, common = torch.cat([start, rest]), len(start)
    with evaluating(model), short_windows(base, 8):
        hidden, logits = by_eager(base, (start, first), (prompt, one, two), common=common)
        targets = torch.cat([start, first, rest, one, two]).roll(-1)
        own = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        off = (token_logprobs(hidden, head, targets, 1.0)[0] - own).abs().mean()
        if not off <= noise:
            raise UnsupportedModelError(
                f"{name}: its LM head does more than we know of (log-probabilities {off:.2g} off)"
            )
        try:
            packed = row(model, (start, first), (prompt, one, two), common=common)
            touched = row(model, (start, other), (prompt, another, two), common=common)
        except TypeError as error:
            why = f"it cannot be told where the samples of a row end ({error})"
            if "NoneType" in str(error):
                why = "its layers read the attention mask themselves (to choose tokens by), and packed rows have none"
            raise UnsupportedModelError(f"{name}: {why}") from error
        apart = (packed - touched).split([common, len(first), len(rest), len(one), len(two)])
        leak = torch.cat(apart[::2]).abs().mean() / packed.abs().mean()
        if not leak <= noise:
            raise UnsupportedModelError(f"{name}: a sample changes with another one in its row (by {leak:.0%})")
        off = (token_logprobs(packed, head, targets, 1.0)[0] - own).abs().mean()
        if not off <= noise:
            raise UnsupportedModelError(
                f"{name}: packed attention differs from its own (log-probabilities {off:.2g} off)"
            )


def by_eager(base: Any, *families: Sequence[Tensor], common: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states (T, H) and logits (T, V) of prompts, each with its answers, one sample at a time."""
    runs = []
    with eager(base):
        for number, (prompt, *answers) in enumerate(families):
            for i, answer in enumerate(answers):
                sample = torch.cat([prompt, answer])[None]
                outputs = (
                    base.base_model(sample, use_cache=False).last_hidden_state,
                    base(sample, use_cache=False).logits,
                )
                known = len(prompt) if i else common * (number > 0)  # what is shared comes once
                runs.append([x[0, known:] for x in outputs])
    hidden, logits = (torch.cat(parts) for parts in zip(*runs, strict=True))
    return hidden, logits


def row(model: nn.Module, *families: Sequence[Tensor], common: int = 0) -> Tensor:
    """Hidden states (T, H) of prompts, each with the answers that follow it, packed as training packs them.

    The first `common` tokens, with which all prompts begin, come once.
    """
    if not one_per_row(model):
        return states(model, families, common)
    return torch.cat(
        [
            states(model, [(prompt, answer)])[len(prompt) if i else common * (number > 0) :]
            for number, (prompt, *answers) in enumerate(families)
            for i, answer in enumerate(answers)
        ]
    )


def states(model: nn.Module, families: Sequence[Sequence[Tensor]], common: int = 0) -> Tensor:
    """The same in one row, whatever the model."""
    ids, places = [families[0][0][:common]], [torch.arange(common)]
    for prompt, *answers in families:
        ids += [prompt[common:], *answers]
        places += [torch.arange(common, len(prompt)), *(torch.arange(len(a)) + len(prompt) for a in answers)]
    lengths = [(len(prompt) - common, [len(a) for a in answers]) for prompt, *answers in families]
    device = ids[0].device
    segments = Segments.of(lengths, common).to(device)
    return backbone_hidden(model, torch.cat(ids), torch.cat(places).to(device), segments)


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
