"""Moves what a phase does not need off the card as it begins, if the plan says so, and back what it needs."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from nanorlhf.engines.base import Engine, Weights
from nanorlhf.memory.plan import MARGIN, Phase, Plan, Unit
from nanorlhf.system.device import GIB, peak_gib, taken

CPU = torch.device("cpu")
ALIGNED = 64  # bytes


class Movable(Protocol):
    """Something that can be on the card or away from it."""

    def leave(self) -> None:
        """Goes to main memory."""
        ...

    def enter(self, device: torch.device) -> None:
        """Comes to the card; it may be used when the card is through with its copies."""
        ...


class Offloadable:
    """Weights or an optimizer's state, between a card and main memory; code that refers to them notices nothing.

    The copy in main memory is kept while they are on the card, so that what never changes leaves without being copied.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self.listed = tensors
        self.kept: dict[int, tuple[Tensor, Tensor, int]] = {}  # by id: tensor, its place in main memory, its version
        self.blocks: list[Tensor] = []  # that these places lie in

    @property
    def tensors(self) -> list[Tensor]:
        """Each once, tied or not."""
        return list({id(t): t for t in self.listed()}.values())

    @torch.no_grad()
    def leave(self) -> None:
        """Copies what may have changed into main memory, and drops the rest."""
        new = [t for t in self.tensors if id(t) not in self.kept]
        places = dict(zip(map(id, new), self.places(new), strict=True))
        homes: dict[int, tuple[Tensor, Tensor, int]] = {}
        for t in self.tensors:
            _, home, version = self.kept.get(id(t), (t, places.get(id(t), t), -1))
            if t.requires_grad or version != t._version:  # noqa: SLF001  autograd's count of writes
                home.copy_(t.detach(), non_blocking=True)
            homes[id(t)] = (t, home, t._version)  # noqa: SLF001
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for t, home, _ in homes.values():
            t.data = home
        self.kept = homes

    def places(self, tensors: list[Tensor]) -> list[Tensor]:
        """Room for these in main memory, in one block that the card can copy from while nothing waits."""
        starts, size = [], 0
        for t in tensors:
            starts.append(size)
            size += -(-t.nbytes // ALIGNED) * ALIGNED
        block = torch.empty(size, dtype=torch.uint8)
        if torch.cuda.is_available() and size:
            runtime: Any = torch.cuda.cudart()  # torch's own pinned memory comes in powers of two
            torch.cuda.check_error(runtime.cudaHostRegister(block.data_ptr(), size, 0))
            weakref.finalize(block, runtime.cudaHostUnregister, block.data_ptr()).atexit = False
        self.blocks.append(block)
        return [block[at : at + t.nbytes].view(t.dtype).view(t.shape) for at, t in zip(starts, tensors, strict=True)]

    @torch.no_grad()
    def enter(self, device: torch.device) -> None:
        """Makes room on the card and copies there."""
        for t in self.tensors:
            there = torch.empty_like(t.data, device=device)
            there.copy_(t.data, non_blocking=True)
            t.data = there
        # Written to while it was away, or not: main memory holds the same now.
        self.kept = {key: (t, home, t._version) for key, (t, home, _) in self.kept.items()}  # noqa: SLF001


class ServedWeights:
    """An engine; when it comes back it serves the newest weights."""

    def __init__(self, engine: Engine, weights: Weights) -> None:
        self.engine, self.weights = engine, weights

    def leave(self) -> None:
        self.engine.sleep()

    def enter(self, device: torch.device) -> None:
        self.engine.wake()
        self.engine.update(self.weights)


class Residency:
    """Follows a plan, and measures what each phase really takes; without a plan nothing moves."""

    def __init__(self, plan: Plan | None = None, device: torch.device = CPU) -> None:
        self.plan, self.device = plan, device
        self.units: dict[Unit, list[Movable]] = {}
        self.away: set[Unit] = set()
        self.measures = plan is not None and device.type == "cuda"
        self.peaks: dict[Phase, float] = {}
        self.seconds = 0.0

    def add(self, unit: Unit, movable: Movable) -> None:
        """Takes charge of something that is on the card."""
        assert unit not in self.away, "what joins the others must be where they are"
        self.units.setdefault(unit, []).append(movable)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """With everything there that the phase needs; it stays until another phase begins."""
        if self.plan is None:
            yield
            return
        self.prepare(self.plan.on_card(phase))
        if not self.measures:
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        others = taken(self.device) - torch.cuda.memory_reserved(self.device)  # what torch's allocator has not got
        yield
        peak = others + torch.cuda.max_memory_allocated(self.device)
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), peak / GIB)

    def prepare(self, wanted: frozenset[Unit]) -> None:
        """Leaving comes first, so that there is room."""
        leaving: list[Unit] = [u for u in self.units if u not in wanted and u not in self.away]
        coming: list[Unit] = [u for u in self.units if u in wanted and u in self.away]
        coming.sort(key=lambda u: u == "engine")  # it takes its weights from the policy
        if not leaving and not coming:
            return
        start = time.perf_counter()
        for unit in leaving:
            for movable in self.units[unit]:
                movable.leave()
            self.away.add(unit)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # the engine's memory is not torch's, so room must be given back to the driver
        for unit in coming:
            for movable in self.units[unit]:
                movable.enter(self.device)
            self.away.remove(unit)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Each phase's peak since the last time, beside the plan's; what moved, and how long that took."""
        if self.plan is None or not self.measures:
            return {"memory/peak_gib": peak_gib(self.device)}
        noted = {"memory/peak_gib": max(self.peaks.values(), default=0.0)}
        for phase, peak in self.peaks.items():
            noted[f"memory/{phase}/peak_gib"] = peak
            noted[f"memory/{phase}/planned_gib"] = (self.plan.total(phase) - MARGIN) / GIB
        noted["time/moving"] = self.seconds
        self.peaks, self.seconds = {}, 0.0
        return noted
