"""Kernels that a card has and the CPU has not, and a watch over all that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cuda_on_cpu.card import place, waited, waits

READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
FREE = {"detach", "_unsafe_view", "device"}  # which launch nothing
LIBRARY = torch.library.Library("aten", "IMPL")


def segments(
    inputs: tuple[Tensor, Tensor, Tensor],
    ends: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    causal: bool,
    options: dict[str, Any],
) -> Iterator[tuple[slice, slice, float, Tensor, list[Tensor]]]:
    """Each segment's queries and keys, the scale, its attention (heads, L, K), and q (heads, L, D), k and v.

    The last query is where the last key is.
    """
    query, key, _ = inputs
    shared, width = query.shape[1] // key.shape[1], query.shape[2]
    assert all(x.is_cuda and x.stride(-1) == 1 and x.dtype == query.dtype for x in inputs)
    assert query.dtype.itemsize == 2 and width % 8 == 0 and width <= 256, "flash attention takes 16 bits, heads of 8n"
    assert all(e.is_cuda and e.dtype == torch.int32 for e in ends), "flash attention takes ends as int32"
    places = [e.tolist() for e in ends]
    for marks, tokens, most, at in zip(places, (query, key), longest, ends, strict=True):
        assert marks[0] == 0 and marks[-1] == len(tokens) and most >= at.diff().max()
    left, right = (-1 if (w := options[f"window_size_{side}"]) is None else w for side in ("left", "right"))
    for mine, seen in zip(*(map(slice, marks, marks[1:]) for marks in places), strict=True):
        q = query[mine].cpu().float().transpose(0, 1)
        k, v = (x[seen].cpu().float().transpose(0, 1).repeat_interleave(shared, 0) for x in inputs[1:])
        at = torch.arange(k.shape[1])
        back = at[k.shape[1] - q.shape[1] :, None] - at
        unseen = (left >= 0) & (back > left) | (causal or right >= 0) & (-back > (0 if causal else right))
        scale = width**-0.5 if options["scale"] is None else options["scale"]
        yield mine, seen, scale, (q @ k.mT * scale).masked_fill(unseen, -torch.inf).softmax(-1), [q, k, v]


def flash_forward(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *rest: Any, **options: Any) -> Any:
    """As `aten::_flash_attention_forward` documents it; nobody reads the sums."""
    key_ends, longest, longest_keys, _, causal, _ = rest
    out, both = torch.empty(query.shape), ((ends, key_ends), (longest, longest_keys))
    for mine, _, _, weights, (_, _, v) in segments((query, key, value), *both, causal, options):
        out[mine] = (weights @ v).transpose(0, 1)
    nothing = torch.empty(0, device="cuda")
    return out.to(query), torch.empty(query.shape[1], len(query), device="cuda"), nothing, nothing, nothing


def flash_backward(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, ...]:
    """As `aten::_flash_attention_backward` documents it."""
    _, ends, key_ends, longest, longest_keys, _, causal, _, _ = rest
    gradients, both = [torch.empty(x.shape) for x in (query, key, value)], ((ends, key_ends), (longest, longest_keys))
    for mine, seen, scale, weights, (q, k, v) in segments((query, key, value), *both, causal, options):
        d, o = (x[mine].cpu().float().transpose(0, 1) for x in (slope, out))
        scores = weights * (d @ v.mT - (d * o).sum(-1, keepdim=True)) * scale
        found = (mine, scores @ k), (seen, scores.mT @ q), (seen, weights.mT @ d)
        for gradient, (part, heads) in zip(gradients, found, strict=True):
            gradient[part] = heads.unflatten(0, (gradient.shape[1], -1)).sum(1).transpose(0, 1)  # shared ones
    return tuple(x.to(query) for x in gradients)


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """16-bit factors, and a product that is not rounded to so few."""
    assert a.dtype == b.dtype and a.dtype.itemsize == 2
    return (a.float() @ b.float()).to(dtype)


def histogram(values: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Of whole numbers too, which the CPU's kernel does not count."""
    return values.cpu().float().histc(bins, low, high).to(values)


def register() -> None:
    """Puts them where the card's own would be."""
    kernels = {"_flash_attention_forward": flash_forward, "_flash_attention_backward": flash_backward}
    for name, kernel in (kernels | {"mm.dtype": wide_product, "histc": histogram}).items():
        LIBRARY.impl(name, kernel, "CUDA")


class Watch(TorchDispatchMode):
    """Counts kernels on the card, and notes what moves, waits, mixes devices or is wider than it needs to be."""

    def __init__(self) -> None:
        super().__init__()
        waits.clear()
        self.bytes = 0  # that go through kernels which are neither products nor attention
        kinds = ("kernels", "copies", "mixed", "float64", "products")
        self.seen: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before, after = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), out))
        if any(t.is_cuda for t in before + after):
            self.note(func, args, kwargs or {}, before, after)
        return out

    def note(self, func: Any, args: Any, kwargs: Any, before: list[Tensor], after: list[Tensor]) -> None:
        """Takes down one kernel."""
        home, _, name = func._schema.name.partition("::")  # noqa: SLF001
        if not func.is_view and "empty" not in name and name not in FREE:
            self.seen["kernels"][name] += 1
            self.bytes += sum(t.nbytes for t in before + after) * (name not in PRODUCTS and home != "torch_attn")
        if name in {"_to_copy", "copy_"} and before[-1].is_cuda != after[0].is_cuda:
            way = "to the card" if after[0].is_cuda else "to main memory"
            self.seen["copies"][f"{place()}: {way}"] += 1
            if not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))):
                waited(f"copy {way}")
        elif any(not t.is_cuda and t.dim() for t in before):
            self.seen["mixed"][f"{place()}: {name}"] += 1
        masked = "index" in name and any(t.dtype in {torch.bool, torch.uint8} for t in before[1:])
        if name in READS or masked or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            waited(name)
        if any(t.dtype == torch.float64 for t in after):
            self.seen["float64"][place()] += 1
        if name in PRODUCTS:
            self.seen["products"][f"{place()}: {before[-1].dtype}".replace("torch.", "")] += 1
