"""Gated MLPs that keep one tensor less for backward: what silu makes of the gate is worked out again."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

RESULT = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
FORWARDS = ([f"down_proj = {RESULT}", "return down_proj"], [f"return {RESULT}"])  # of transformers' classes
NAMES = ("SiLU", "SiLUActivation")


class Gate(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202); the same numbers, forward and backward, as with both kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_up = silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), of_up


def is_gated(module: nn.Module) -> bool:
    """Whether it is an MLP whose forward is silu(gate) * up, and no more."""
    return type(getattr(module, "act_fn", None)).__name__ in NAMES and body_of(type(module).forward) in FORWARDS


def body_of(function: Any) -> list[str]:
    """The lines below a function's head; none if its source is nowhere."""
    with contextlib.suppress(OSError):
        return [line.strip() for line in inspect.getsource(function).splitlines()[1:] if line.strip()]
    return []


def gated(mlp: Any, x: Tensor) -> Tensor:
    """The forward of such an MLP."""
    out: Any = Gate.apply(mlp.gate_proj(x), mlp.up_proj(x))
    return mlp.down_proj(out)
