"""The chunked head against plain logits: values, gradients, and how much it holds at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf.policy.logprobs import Head, chunk_size, head_of, token_logprobs
from nanorlhf.system import gpu_memory
from tests.models import tiny

N, H, V = 11, 5, 17
HEADS = {"plain": {}, "scale": {"scale": 0.6}, "softcap": {"softcap": 1.5}, "both": {"scale": 1.7, "softcap": 1.5}}


def inputs(dtype: torch.dtype = torch.float64, trainable: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=draw, dtype=dtype) for s in ((N, H), (V, H), (V,)))
    targets = torch.randint(V, (N,), generator=draw)
    return hidden.requires_grad_(), weight.requires_grad_(trainable), bias.requires_grad_(trainable), targets


def written_out(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = (hidden @ head.weight.t() + (0 if head.bias is None else head.bias)) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("trainable", [True, False], ids=["trained-head", "frozen-head"])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_those_of_plain_logits(kind: str, trainable: bool) -> None:
    hidden, weight, bias, targets = inputs(trainable=trainable)
    learned = [hidden, weight, bias] if trainable else [hidden]
    head = Head(weight, bias, **HEADS[kind])
    ours = token_logprobs(hidden, head, targets, 0.7, entropy_grad=True, chunk=4)
    plain = written_out(hidden, head, targets, 0.7)
    torch.testing.assert_close(ours, plain)
    by = [torch.linspace(-1, 2, N, dtype=torch.float64), torch.linspace(3, -1, N, dtype=torch.float64)]
    torch.testing.assert_close(torch.autograd.grad(ours, learned, by), torch.autograd.grad(plain, learned, by))


@pytest.mark.parametrize("trainable", [True, False], ids=["trained-head", "frozen-head"])
def test_gradcheck(trainable: bool) -> None:
    hidden, weight, bias, targets = inputs(trainable=trainable)

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, scale=1.7, softcap=1.5)
        return token_logprobs(hidden, head, targets, 0.7, entropy_grad=True, chunk=4)

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))


@pytest.mark.parametrize("trainable", [True, False], ids=["trained-head", "frozen-head"])
def test_entropy_is_detached_unless_asked_for(trainable: bool) -> None:
    hidden, weight, _, targets = inputs(trainable=trainable)
    logprobs, entropy = token_logprobs(hidden, Head(weight), targets, 1.0, chunk=4)
    assert logprobs.requires_grad and not entropy.requires_grad
    expected = written_out(hidden, Head(weight), targets, 1.0)
    torch.testing.assert_close(entropy, expected[1].detach())
    given = torch.autograd.grad(logprobs.sum(), hidden)
    torch.testing.assert_close(given, torch.autograd.grad(expected[0].sum(), hidden))


def test_the_same_logits_by_hand() -> None:
    # Logits 1 and 3 at temperature 2 lie 1 apart: log-probability of the second -log(1 + e^-1); p = .731059
    head = Head(torch.tensor([[1.0], [3.0]]))
    logprobs, entropy = token_logprobs(torch.ones(1, 1), head, torch.tensor([1]), 2.0)
    torch.testing.assert_close(logprobs, torch.tensor([-0.3132617]))
    torch.testing.assert_close(entropy, torch.tensor([0.5822031]))


@pytest.mark.parametrize("trainable", [True, False], ids=["trained-head", "frozen-head"])
def test_bf16_autocast_rounds_products_only(trainable: bool) -> None:
    hidden, weight, _, targets = inputs(torch.float32, trainable)
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in (hidden, weight)]
    expected = written_out(rounded[0], Head(rounded[1]), targets, 0.7)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = token_logprobs(hidden, Head(weight), targets, 0.7, chunk=4)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=0.02)
    learned = [hidden, weight] if trainable else [hidden]
    for ours, theirs in zip(
        torch.autograd.grad(logprobs.sum(), learned), torch.autograd.grad(expected.sum(), rounded), strict=False
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1)


def test_confident_tokens_stay_finite_and_empty_rows_are_fine() -> None:
    hidden = torch.full((2, 1), 500.0, requires_grad=True)
    head = Head(torch.tensor([[1.0], [-1.0]]))
    logprobs, entropy = token_logprobs(hidden, head, torch.tensor([0, 1]), 1.0, entropy_grad=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.tolist() == [0.0, -1000.0] and entropy.tolist() == [0.0, 0.0]
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert token_logprobs(hidden[:0], head, torch.tensor([], dtype=torch.long), 1.0)[0].shape == (0,)


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere", "qwen2"])
def test_head_of_reads_what_the_config_does_to_logits(architecture: str) -> None:
    model = tiny(architecture)
    ids = torch.arange(3, 20)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
        hidden = model.base_model(ids[None]).last_hidden_state[0]
        ours, _ = token_logprobs(hidden, head_of(model), ids, 0.7)
    expected = (logits / 0.7).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("free", "reserved", "logits"),
    [
        (100 << 20, 0, 1 << 24),  # short of memory: 64 MiB of logits, as ever
        (2 << 30, 0, (2 << 30) // 64),
        (1 << 30, 1 << 30, (2 << 30) // 64),  # what the allocator holds unused is free too
        (60 << 30, 0, 1 << 28),  # and more than 1 GiB is never worth it
    ],
)
def test_cuda_chunks_follow_what_is_left(
    free: int, reserved: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_memory, "left", lambda _: free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved + 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 5)
    assert chunk_size(torch.device("cuda")) == logits
    assert chunk_size(torch.device("cpu")) == 1 << 22


class Largest(TorchDispatchMode):
    """The largest tensor any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.numel = max([self.numel, *(x.numel() for x in made if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("trainable", [True, False], ids=["trained-head", "frozen-head"])
def test_nothing_larger_than_a_chunk_is_ever_made(trainable: bool) -> None:
    rows, tokens, vocabulary = 8, 100, 1_000
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=trainable)
    with Largest() as largest:
        logprobs, entropy = token_logprobs(
            hidden, Head(weight, softcap=5.0), torch.zeros(tokens, dtype=torch.long), 0.7, entropy_grad=True, chunk=rows
        )
        (logprobs.sum() + entropy.sum()).backward()
    assert largest.numel == rows * vocabulary
