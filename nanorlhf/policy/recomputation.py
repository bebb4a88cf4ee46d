"""Layer inputs under recomputation: out to main memory as layers run, back before they are asked for."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from nanorlhf.errors import UsageError
from nanorlhf.policy.sharding import layers_of
from nanorlhf.system import gpu_memory

SHARE = 0.05  # of the memory that may be used: what layer inputs may take before they are sent away


class Parked:
    """A tensor in main memory, on its way from or to its device.

    Copies run on a stream of their own. What leaves is held until two more have left after it, and what is asked of the
    device from then on waits for its copy: so its memory is free for the next layers however far the CPU runs ahead.
    What comes back lies in memory of the copying stream's, which only its later copies use again.
    """

    def __init__(self, tensor: Tensor, earlier: Parked | None, stream: torch.cuda.Stream | None) -> None:
        self.device, self.stream = tensor.device, stream
        self.earlier = earlier and weakref.ref(earlier)
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=stream is not None)
        with self.aside():
            self.host.copy_(tensor, non_blocking=True)
            self.done = self.stream and self.stream.record_event()
        self.here: Tensor | None = tensor
        if earlier is not None and (before := earlier.earlier and earlier.earlier()) is not None:
            before.release()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On the side stream, after all that was asked for so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def wait(self) -> None:
        """Has what is asked of the device from now on wait for the last copy."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)

    def release(self) -> None:
        """Gives the device's memory to others, if it has not."""
        if self.here is not None:
            self.wait()
            self.here = None

    def call(self) -> None:
        """Sets out for the device, if it is not there."""
        if self.here is None:
            with self.aside():
                self.here = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
                self.here.copy_(self.host, non_blocking=True)
                self.done = self.stream and self.stream.record_event()

    def fetch(self) -> Tensor:
        """The tensor on its device; the one that backward asks for next sets out meanwhile."""
        self.call()
        earlier = self.earlier and self.earlier()
        if earlier is not None:
            earlier.call()
        self.wait()
        tensor, self.here = self.here, None
        assert tensor is not None
        return tensor


class Offload:
    """Runs a layer to be recomputed in backward; its input is parked if all of them would take `least` bytes."""

    def __init__(self, layers: int, least: float) -> None:
        self.layers, self.least = layers, least
        self.stream: torch.cuda.Stream | None = None
        self.last: Callable[[], Parked | None] = lambda: None

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        with saved_tensors_hooks(self.park, unpark):
            return checkpoint(layer, *args, use_reentrant=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Offload:
        return Offload(self.layers, self.least)  # a stream cannot be copied, and needs not be

    def park(self, tensor: Tensor) -> Tensor | Parked:
        """The tensor or its parked copy, for autograd to keep in place of a layer's input."""
        if not tensor.is_floating_point() or tensor.nbytes * self.layers < self.least:
            return tensor
        if tensor.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        parked = Parked(tensor, self.last(), self.stream)
        self.last = weakref.ref(parked)
        return parked


def unpark(kept: Tensor | Parked) -> Tensor:
    """The tensor that autograd gets back."""
    return kept.fetch() if isinstance(kept, Parked) else kept


def recompute(
    model: Any, offload: Literal["auto", "on", "off"], device: torch.device, count: int | None = None
) -> None:
    """The first `count` layers (or all) keep only their input, on the device or, if that is much, in main memory.

    Backward comes to them last, when what the others kept is gone. What was said before is forgotten. transformers' own
    switch works in training mode only, in which some layers drop out or add noise as well.
    """
    layers = layers_of(model)
    if not layers:
        raise UsageError(f"gradient_checkpointing=True: {type(model).__name__} does not say what its layers are")
    run: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    if offload == "on" or (offload == "auto" and device.type == "cuda"):
        least = 0.0 if offload == "on" else SHARE * gpu_memory.allowed(device)
        run = Offload(len(layers[:count]), least)
    for layer in layers:
        layer.forward = forward_of(layer)
    for layer in layers[:count]:
        layer.forward = partial(run_twice, run, layer.forward)


def forward_of(layer: Any) -> Callable[..., Any]:
    """A layer's own forward."""
    forward = layer.forward
    return forward.args[1] if isinstance(forward, partial) and forward.func is run_twice else forward


def run_twice(run: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a layer's `forward`, once more in backward if there will be one."""
    return run(partial(forward, **kwargs), *args) if torch.is_grad_enabled() else forward(*args, **kwargs)
