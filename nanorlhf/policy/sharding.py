"""A base too large for one card: of each layer every process keeps a part, and all of it only while it works."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from nanorlhf.errors import UsageError
from nanorlhf.system.distributed import world


def shard(base: nn.Module, device: torch.device) -> None:
    """Cuts the frozen weights of the layers of `base` into parts; adapters, embeddings and the LM head stay whole."""
    layers = layers_of(base)
    if not layers:
        raise UsageError(f"shard_base=True: {type(base).__name__} does not say what its layers are")
    mesh = init_device_mesh(device.type, (world().size,))
    for layer in layers:
        learning = {p for p in layer.parameters() if p.requires_grad}
        layer.to(device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=learning)
    body = base.base_model
    assert isinstance(body, nn.Module)
    # With nothing of its own: it makes the layers one model, whose parts come while others are at work.
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not isinstance(p, DTensor)})


def layers_of(base: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of a model, as transformers marks them."""
    return [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]


def whole(weight: Tensor) -> Tensor:
    """All of a weight of which this process may have a part; all processes ask at once."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
