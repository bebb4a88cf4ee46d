"""Everything a resumed run needs, written so that a crash leaves the old state or the new one, never half."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

STATE = "trainer_state.pt"


def save(run: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], keep: int) -> Path:
    """Writes `checkpoints/step_N` by `write(folder)` plus `state`, points `latest` at it, and drops the oldest."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    torch.save({**state, "step": step, "random": random_state()}, draft / STATE)
    for path in draft.rglob("*"):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)
    sync(folder.parent)
    pointer = run / "checkpoints" / ".latest.draft"
    pointer.write_text(folder.name + "\n")
    sync(pointer)
    pointer.replace(run / "checkpoints" / "latest")
    sync(folder.parent)
    for old in sorted(folder.parent.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return folder


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    pointer = run / "checkpoints" / "latest"
    return pointer.parent / pointer.read_text().strip() if pointer.is_file() else None


def step_of(folder: Path | None) -> int:
    """The step after which a checkpoint was written; 0 for none."""
    return int(folder.name.removeprefix("step_")) if folder else 0


def load_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state; random states are put back."""
    state = torch.load(folder / STATE, weights_only=False)
    restore_random(state["random"])
    return state


def random_state() -> dict[str, Any]:
    """Where every random generator of this process stands."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}  # noqa: NPY002


def restore_random(state: dict[str, Any]) -> None:
    """Puts every random generator back to where it stood."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def sync(path: Path) -> None:
    """Makes sure that a file, or a folder's list of files, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
