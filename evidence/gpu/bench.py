"""Checks on a GPU that is there for minutes: every figure is written as it comes, and none ends those after it."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evidence.gpu import shapes
from nanorlhf.errors import first_line
from nanorlhf.records.metrics import finite
from nanorlhf.system.device import GIB

# r1_zero's sizes on a card of 40 GB; in small, what a CPU does in seconds.
FULL = {"max_prompt_length": 512, "max_completion_length": 8000, "prompts_per_step": 64, "lora_r": 64}
SMALL = {"max_prompt_length": 64, "max_completion_length": 16, "prompts_per_step": 2, "lora_r": 8, "token_budget": 160}
MOST, LEAST = 3, 60.0  # a check is ended after so many times the seconds it should take, but not before so many
GRACE = 60  # seconds beyond a run's own, after which the process ends and says where it was


class MissedError(Exception):
    """A figure that is not what it should be."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something to find out, and the seconds that it is expected to take."""

    work: Callable[[Bench], None]
    seconds: float

    @property
    def name(self) -> str:
        return self.work.__name__


class Bench:
    """The things that checks share: models made once, and the file that figures go to."""

    def __init__(self, folder: Path, device: str, tiny: bool, path: Path) -> None:
        self.folder, self.device, self.tiny, self.path = folder, device, tiny, path
        self.check = "run"
        self.step: Callable[[], Any] | None = None  # an update from one row, once it has passed
        self.trainer: Any = None  # once there is an engine

    def note(self, **figures: Any) -> None:
        """Writes a line, whatever happens next."""
        line = json.dumps({"check": self.check} | {name: finite(value) for name, value in figures.items()})
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)

    def within(self, limit: float, **figures: Any) -> None:
        """Writes a figure, the first of these, which must not be above `limit`."""
        name, figure = next(iter(figures.items()))
        self.note(**figures, limit=limit)
        if not figure <= limit:
            raise MissedError(f"{name} is {figure:.4g}, above {limit:g}")

    def close(self) -> None:
        """Ends what is still there."""
        if self.trainer is not None:
            self.trainer.close()

    def model(self, shape: str, layers: int = 0) -> Path:
        """A folder with this model in `model`."""
        folder = self.folder / f"{shape}-{layers}"
        if not folder.exists():
            shapes.write(folder / "model", shape, self.device, self.tiny, layers, sharpness=5.0)
        return folder

    def sizes(self, **others: Any) -> dict[str, Any]:
        """The options that the checked runs have in common."""
        return (SMALL if self.tiny else FULL) | {"lora_alpha": 16, "gpu_memory_gib": 39.5} | others


def carry_out(checks: Sequence[Check], bench: Bench, seconds: float) -> bool:
    """Carries out those that fit into so many seconds; whether all of them held."""
    end, held = time.monotonic() + seconds, True
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
    for at, check in enumerate(checks):
        bench.check, left = check.name, end - time.monotonic()
        if check.seconds > left:
            bench.note(skipped=f"it takes some {check.seconds:.0f} s, and {left:.0f} s are left")
            held = False
            continue
        held &= carried_out(check, bench)
        gc.collect()
        if not usable(bench.device):
            go_on_anew([c.name for c in checks[at + 1 :]], end - time.monotonic())
    faulthandler.cancel_dump_traceback_later()
    return held


def carried_out(check: Check, bench: Bench) -> bool:
    """Whether a check held; a line says so, with what was wrong."""
    start, wrong = time.monotonic(), None
    try:
        with ended_after(max(LEAST, MOST * check.seconds)):
            check.work(bench)
    except Exception as error:  # noqa: BLE001  whatever it died of, the next one has its turn
        wrong = f"{type(error).__name__}: {first_line(error)}"
        traceback.print_exc()
    bench.note(ok=wrong is None, took=time.monotonic() - start, **({"wrong": wrong} if wrong else {}))
    return wrong is None


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """A TimeoutError after so many seconds, as soon as Python is at work again."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def usable(device: str) -> bool:
    """Whether the card still answers this process: after some errors it does not, until the process ends."""
    if device == "cpu":
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def go_on_anew(names: Sequence[str], seconds: float) -> None:
    """Becomes a process that carries out the rest."""
    if names:
        faulthandler.cancel_dump_traceback_later()
        rest = ["--seconds", str(seconds), "--only", *names]
        os.execv(sys.executable, [*sys.orig_argv, *rest])  # noqa: S606  the same program again


def in_gib(**bytes_by_name: float) -> dict[str, float]:
    return {f"{name}_gib": round(value / GIB, 3) for name, value in bytes_by_name.items()}
