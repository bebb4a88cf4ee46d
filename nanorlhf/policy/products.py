"""Products of matrices, by the library that is quickest on this processor."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

CPUINFO = Path("/proc/cpuinfo")
SMALL = 1 << 24  # multiplications; fewer take no 0.1 ms by either
ROWS = 64  # that it gets multiples of: for each number of rows it compiles code, some 10 ms and half a MiB


@functools.cache
def prefers_onednn() -> bool:
    """Whether this is an AMD processor with AVX-512: MKL, which PyTorch asks, leaves half of its width unused."""
    amd = CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text()
    return amd and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b` of matrices (M, K) and (K, N), plus a bias (N,)."""
    plain = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and not isinstance(a, FakeTensor)
    if plain and a.numel() * b.shape[1] >= SMALL and a.shape[0] % ROWS == 0 and prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")  # noqa: SLF001  # torch.compile's
    return a @ b if bias is None else torch.addmm(bias, a, b)


def missing(rows: Tensor) -> int:
    """Rows that would have to be added for oneDNN, if it shall take the products."""
    return -len(rows) % ROWS if rows.device.type == "cpu" and len(rows) > ROWS and prefers_onednn() else 0


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32 (float64 for float64); on CUDA it is not rounded to 16 bits on the way."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype.itemsize == 2:
            return torch.mm(a, b, out_dtype=torch.float32)
        return product(a, b).to(torch.promote_types(a.dtype, torch.float32))


class Linear(torch.autograd.Function):
    """x W' + b for rows x (T, I)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), grad, needed = ctx.saved_tensors, grads[0].contiguous(), ctx.needs_input_grad
        of_x = product(grad, weight) if needed[0] else None
        of_weight = product(grad.t(), x) if needed[1] else None
        return of_x, of_weight, grad.sum(0) if needed[2] else None


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The output of a linear layer."""
    if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        return nn.Linear.forward(layer, x)
    rows: Any = Linear.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias)
    return rows.view(*x.shape[:-1], -1)
