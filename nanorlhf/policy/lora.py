"""LoRA as one function: the adapter's product is added into the base's, and nothing is scaled or cast on the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanorlhf.policy.products import product, wide_product


class Adapted(torch.autograd.Function):
    """x W' + b + s (x A') B' (arXiv:2106.09685) for rows x (T, I), in their dtype; A and B learn, W and b do not."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        down, up = a.to(x.dtype), b.to(x.dtype)
        out = product(x, weight.t(), bias)
        low = product(x, down.t())
        out.addmm_(low, up.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, down, up, low)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, low = ctx.saved_tensors
        grad = grads[0].contiguous()
        into_low = product(grad, up).mul_(ctx.scaling)
        of_a = wide_product(into_low.t(), x).to(ctx.dtypes[0])
        of_b = wide_product(grad.t(), low).mul_(ctx.scaling).to(ctx.dtypes[1])
        of_x = product(grad, weight).addmm_(into_low, down) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_a, of_b, None


def fuse(layer: Any) -> None:
    """Makes a layer with adapters run as one function whenever it can; its own forward does the rest."""
    layer.forward = partial(adapted, layer, layer.forward)


def adapted(layer: Any, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Runs a layer of PEFT's: as one function if a single plain adapter is on, else as PEFT does."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    name = plain_adapter(layer, dtype)
    if name is None or args or kwargs:
        return forward(x, *args, **kwargs)
    base, scaling = layer.base_layer, layer.scaling[name]
    rows, a, b = x.to(dtype).reshape(-1, x.shape[-1]), layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.autocast(kind, enabled=False):
        out: Any = Adapted.apply(rows, base.weight, base.bias, a, b, scaling)
    return out.view(*x.shape[:-1], -1)


def plain_adapter(layer: Any, dtype: torch.dtype) -> str | None:
    """The one adapter that is on, if it is plain and the base frozen and of `dtype`; else None."""
    base, active = layer.base_layer, [name for name in layer.active_adapters if name in layer.lora_A]
    if type(base) is not nn.Linear or any(p.requires_grad or p.dtype != dtype for p in base.parameters()):
        return None
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    (name,) = active
    dropout = layer.lora_dropout[name]
    drops = dropout.training and not isinstance(dropout, nn.Identity)
    if drops or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    return name
