"""The processes of a run, one a device: which share each does, and what they tell each other.

`accelerate launch` (or torchrun) starts them, and each runs the whole program. Every process holds the step's whole
rollout, so that credit, weights of the loss and metrics are what they would be in one; it writes, measures and
differentiates its share of it, and gradients are added up once an update.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from nanorlhf.errors import RunError, UsageError
from nanorlhf.system.terminal import launched

T = TypeVar("T")

SHARDING = ("FSDP", "DEEPSPEED")  # accelerate's ways, of which its launcher tells
BUCKET = 64 * 2**20  # bytes that are copied to be summed over processes at once
PATIENCE = timedelta(hours=3)  # with a process that still writes; one that has died is noticed at once


@dataclass(frozen=True, slots=True)
class World:
    """One process among `size`; alone, everything here is what it was given."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # where what they exchange lies

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a sequence."""
        start, end = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return items[start:end]

    def gather(self, item: T) -> list[T]:
        """The items that all processes gave, in their order."""
        if self.size == 1:
            return [item]
        everyone: list[Any] = [None] * self.size
        run_collective(distributed.all_gather_object, everyone, item)
        return everyone

    def concat(self, items: Sequence[T]) -> list[T]:
        """The items of all processes in a row."""
        return [item for part in self.gather(list(items)) for item in part]

    def broadcast(self, item: T) -> T:
        """The item that the first process gave."""
        if self.size == 1:
            return item
        box: list[Any] = [item]
        run_collective(distributed.broadcast_object_list, box, device=self.device)
        return box[0]

    def first_only(self, work: Callable[[], T]) -> T:
        """The first process's result, for all; a mistake found there is raised in all of them."""
        if self.size == 1:
            return work()
        made: Any = None
        if self.first:
            try:
                made = work()
            except (UsageError, RunError) as error:
                made = error
        made = self.broadcast(made)
        if isinstance(made, UsageError | RunError):
            raise made
        return made

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Puts the sum over all processes in the place of each tensor."""
        if self.size == 1:
            return
        for some in buckets(tensors):
            parts = [t.detach().flatten().to(self.device) for t in some]
            flat = torch.cat(parts) if len(parts) > 1 else parts[0]
            run_collective(distributed.all_reduce, flat)
            for tensor, total in zip(some, flat.split([t.numel() for t in some]), strict=True):
                tensor.detach().copy_(total.view_as(tensor))

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Gives every parameter the sum of its gradients, and returns that of losses; one without samples had none."""
        if self.size == 1:
            return loss
        total = torch.tensor([loss, any(p.grad is not None for p in parameters)], dtype=torch.float64)
        self.sum([total])
        if total[1]:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.sum([p.grad for p in parameters if p.grad is not None])
        return float(total[0])

    def sync(self, parameters: Iterable[Tensor]) -> None:
        """Gives all processes the first one's values."""
        if self.size == 1:
            return
        for p in parameters:
            here = p.detach().to(self.device)
            run_collective(distributed.broadcast, here, 0)
            p.detach().copy_(here)


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, as many as are copied together: one that is larger is alone, and is not copied."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for some in by_type.values():
        bucket: list[Tensor] = []
        for tensor in some:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def run_collective(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Something that all processes do at once; if one of them is gone it cannot be done."""
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = re.sub(r"^\[\S+\] |\. This is typically .*", "", str(error).strip().split("\n", 1)[0])
        raise LostError(f"another process of this run has ended, so this one ends too ({reason})") from error


class LostError(RunError):
    """A process of the run is gone."""


_world = World()


def world() -> World:
    """This process's place."""
    return _world


def end() -> None:
    """Ends the group with its threads, which may abort a process that exits while they run."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def join(device: torch.device) -> World:
    """Takes the place that a launcher gave, once; without a launcher a process is alone."""
    global _world  # noqa: PLW0603  a process is in one place
    if _world.size == 1 and launched():
        from accelerate import PartialState

        for name in SHARDING:
            if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true":
                raise UsageError(
                    f"accelerate's --use_{name.lower()} has no effect here: say --shard_base to keep the base in parts"
                )
        state = PartialState(cpu=device.type != "cuda", timeout=PATIENCE)
        atexit.register(end)
        _world = World(state.process_index, state.num_processes, state.device)
    return _world
