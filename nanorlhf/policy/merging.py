"""Weights as engines and checkpoints want them: the adapter added out of place, so that the base never drifts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nanorlhf.policy.loading import POLICY
from nanorlhf.policy.sharding import whole


@torch.no_grad()
def merged(base: PreTrainedModel, everything: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the plain model by its Hugging Face name.

    Or only those that an adapter changes, and their neighbours: engines make one matrix of several.
    """
    deltas = {id(m.get_base_layer().weight): m for m in base.modules() if isinstance(m, LoraLayer)}  # type: ignore[union-attr]
    named = [(name, p) for name, p in base.named_parameters() if "lora_" not in name]
    changed = {block(name) for name, p in named if id(p) in deltas}
    for name, parameter in named:
        if not everything and changed and block(name) not in changed:
            continue
        adapted = deltas.get(id(parameter))
        weight = whole(parameter.detach())
        if adapted is not None:
            weight = weight + adapted.get_delta_weight(POLICY).to(weight.dtype)  # type: ignore[operator]
        yield name.replace(".base_layer.", "."), weight


def saved(base: PreTrainedModel, everything: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The same by the names and in the shapes of a checkpoint, where a layer may have a tensor for each expert."""
    if getattr(base, "_weight_conversions", None) == []:
        yield from merged(base, everything)
        return
    for _, layer in groupby(merged(base, everything), lambda named: re.match(r".*?\.\d+\.|", named[0])[0]):  # type: ignore[index]
        yield from revert_weight_conversion(base, dict(layer)).items()


def block(name: str) -> str:
    """The attention or MLP that a layer's parameter belongs to."""
    return name.replace(".base_layer.", ".").rpartition(".")[0].rpartition(".")[0]
