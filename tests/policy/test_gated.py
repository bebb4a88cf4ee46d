"""Gated MLPs against transformers' own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from nanorlhf.policy.gated import Gate, gated, is_gated
from nanorlhf.policy.loading import speed_up
from tests.models import tiny


def results_of(mlp: torch.nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """The output and all gradients, and how many numbers of its own size forward keeps."""
    kept: list[Tensor] = []
    mine = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = mlp(mine)
    out.square().sum().backward()
    assert mine.grad is not None
    grads = [p.grad for p in mlp.parameters() if p.grad is not None]
    activations = {t.data_ptr(): t.numel() for t in kept if not isinstance(t, torch.nn.Parameter)}
    return [out.detach(), mine.grad, *grads], sum(activations.values())


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "mistral"])
def test_they_give_and_learn_the_same_and_keep_less(architecture: str) -> None:
    torch.manual_seed(0)
    model: Any = tiny(architecture)
    mlp = model.base_model.layers[0].mlp
    assert is_gated(mlp)
    less = copy.deepcopy(mlp)
    less.forward = lambda x: gated(less, x)
    x = torch.randn(2, 7, mlp.gate_proj.in_features)
    (expected, kept), (found, fewer) = results_of(mlp, x), results_of(less, x)
    assert len(expected) == 5
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert kept - fewer == 2 * 7 * mlp.gate_proj.out_features


def test_its_gradients_are_its_derivatives() -> None:
    inputs = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(Gate.apply, inputs)


def test_an_mlp_that_does_more_stays_as_it_is() -> None:
    model: Any = tiny("qwen2")
    mlp = model.base_model.layers[0].mlp

    class Scaled(type(mlp)):
        def forward(self, x: Tensor) -> Tensor:
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return 2 * down_proj

    assert is_gated(mlp)
    mlp.__class__ = Scaled
    assert not is_gated(mlp)
    code: dict[str, Any] = {"MLP": type(mlp)}
    exec("class Nowhere(MLP):\n    def forward(self, x):\n        return x", code)  # noqa: S102
    mlp.__class__ = code["Nowhere"]  # as in an interpreter: there is no file to read
    assert not is_gated(mlp)


def test_other_mlps_stay_as_they_are() -> None:
    for architecture in ("gemma2", "phi3"):  # gelu, and gate and up in one
        model: Any = tiny(architecture)
        assert not any(is_gated(module) for module in model.modules())
        speed_up(model)
        assert all("forward" not in vars(layer.mlp) for layer in model.base_model.layers)
