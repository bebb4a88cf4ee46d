"""Finds what a pass through a model needs at once, by running it on tensors without memory and counting what lives."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from nanorlhf.config.training import TrainConfig
from nanorlhf.memory.workspace import Line, Workspace, between
from nanorlhf.policy import attention, recomputation
from nanorlhf.policy.loading import dtype_of, let_lora_drop, speed_up, with_adapter
from nanorlhf.policy.logprobs import CHUNK, Head, head_of, plain, token_logprobs
from nanorlhf.segments import Segments

Family = tuple[int, Sequence[int]]  # tokens of a prompt, and of each of its answers
LAYERS = 2  # of the smaller of two traced models; a line through both says the rest


class Living(TorchDispatchMode):
    """Counts the bytes of all storages made under it that still live, and the most there ever were."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {storage(t): 0 for t in known}  # what was there before weighs nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # autograd asks for it all the time
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.born(leaf)
        return out

    def born(self, tensor: Tensor) -> None:
        key, owner = storage(tensor), tensor.untyped_storage()
        if key in self.sizes:
            return
        self.sizes[key] = owner.nbytes()
        self.now += owner.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(owner, self.died, key)

    def died(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def storage(tensor: Tensor) -> int:
    """The key that views of the same memory have in common."""
    return tensor.untyped_storage()._cdata  # noqa: SLF001  data_ptr is 0 for tensors without memory


def skeleton(
    config: TrainConfig, about: PretrainedConfig, peft_config: Any = None, layers: int | None = None
) -> nn.Module:
    """The model with its adapter as on CUDA, shapes without weights; with fewer `layers` if that is said."""
    about = shortened(about, layers) if layers else about
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            about, dtype=dtype_of(config, "cuda"), trust_remote_code=config.trust_remote_code
        )
        fresh = dataclasses.replace(config, adapter_name_or_path=None)
        model = with_adapter(fresh, model, copy.deepcopy(peft_config))
        speed_up(model)
        return model


def shortened(about: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with its first layers only."""
    about = copy.deepcopy(about)
    text: Any = about.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return about


def without_memory(model: nn.Module) -> list[Tensor]:
    """Replaces every weight by a fake one, in place; gives all of them, and a gradient for each that learns."""
    made: dict[int, nn.Parameter] = {}
    known: list[Tensor] = []
    for module in model.modules():
        for name, p in module._parameters.items():  # noqa: SLF001  tied ones stay tied
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                made.setdefault(id(p), nn.Parameter(fake, requires_grad=p.requires_grad))
                module._parameters[name] = made[id(p)]  # noqa: SLF001
        for name, b in module._buffers.items():  # noqa: SLF001
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")  # noqa: SLF001
                known.append(module._buffers[name])  # type: ignore[arg-type]  # noqa: SLF001
    for parameter in model.parameters():
        known.append(parameter)
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)
    return known


def through_layers(model: nn.Module, segments: Segments, *, grad: bool, half: bool) -> tuple[int, int]:
    """Bytes at the worst moment of a pass over such a row, and those left when the forward is through."""
    known = without_memory(model)
    ids = torch.zeros(1, sum(segments.lengths), dtype=torch.long)
    with Living(known) as living, torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = (
                plain(model)
                .base_model(input_ids=ids, position_ids=ids, use_cache=False, segments=segments)
                .last_hidden_state
            )
        kept = living.now
        if grad:
            out.backward(torch.ones_like(out))
    return living.peak, kept


def through_head(head: Head, tokens: int, *, grad: bool, half: bool, entropy_grad: bool) -> int:
    """Bytes at the worst moment of log-probabilities from hidden states that are there."""
    size, dtype = head.weight.shape[1], torch.bfloat16 if half else head.weight.dtype
    hidden = torch.zeros(tokens, size, dtype=dtype, requires_grad=grad)
    rows, targets = torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens, dtype=torch.long)
    weight = head.weight.detach().requires_grad_(head.trainable)
    known = [hidden, rows, targets, weight]
    chunk = max(64, CHUNK // len(weight))
    with Living(known) as living, torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            how = dataclasses.replace(head, weight=weight)
            logprobs, entropy = token_logprobs(hidden[rows], how, targets, 1.0, entropy_grad=entropy_grad, chunk=chunk)
        if grad:
            (logprobs + entropy if entropy_grad else logprobs).sum().backward()
    return living.peak


def trace(
    make: Callable[[int], nn.Module],
    layers: int,
    family: Family,
    *,
    grad: bool,
    half: bool,
    recompute: bool = False,
    entropy_grad: bool = False,
) -> Workspace:
    """The workspace of a model of `layers` layers: `make` makes low ones, which one and two such families pass."""
    low, high = min(LAYERS, layers), min(2 * LAYERS, layers)
    models = {depth: make(depth).eval() for depth in (low, high)}
    lines: dict[int, tuple[Line, Line]] = {}
    longest = family[0] + sum(family[1])
    with FakeTensorMode():
        for depth, model in models.items():
            if grad:
                let_lora_drop(model)
            base = plain(model)
            base.set_attn_implementation(attention.NAME)
            if recompute:
                recomputation.recompute(base, "off", torch.device("cpu"))
            one = through_layers(model, Segments.of([family]), grad=grad, half=half)
            two = through_layers(model, Segments.of([family, family]), grad=grad, half=half)
            peak, kept = (Line.through((longest, one[i]), (2 * longest, two[i])) for i in (0, 1))
            lines[depth] = peak, kept
        head = head_of(models[low])
        chunk = max(64, CHUNK // len(head.weight))
        options = {"grad": grad, "half": half, "entropy_grad": entropy_grad}
        points = [(k * chunk, through_head(head, k * chunk, **options)) for k in (2, 4)]
    at = 0.0 if low == high else (layers - low) / (high - low)
    body, kept = (between(lines[low][i], lines[high][i], at) for i in (0, 1))
    return Workspace(body, kept, Line.through(*points))
