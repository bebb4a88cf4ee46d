"""Everything a resumed run needs, written so that a crash leaves the old state or the new one, never half."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanorlhf.config.names import CHECKPOINTS, latest, run_of, whole
from nanorlhf.errors import UsageError
from nanorlhf.records import state_file
from nanorlhf.system.files import digest, discard, whole_folder, write_whole
from nanorlhf.system.random_state import random_state, restore_random

STATE, CHECKSUMS = "trainer_state", "checksums.json"


def save(run: Path, step: int, write: Callable[[Path], None], own: dict[str, Any], keep: int) -> Path:
    """Writes `checkpoints/step_N`, by `write(folder)` and what is our own; `latest` points at it, the oldest go."""
    folder = run / CHECKPOINTS / f"step_{step:06d}"
    with whole_folder(folder) as draft:
        write(draft)
        state_file.write({"random": random_state(), **own, "step": step}, draft, STATE)
        sums = {name: digest(draft / name) for name in files(draft)}
        (draft / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
    write_whole(folder.parent / "latest", folder.name + "\n")
    tidy(run, keep)
    return folder


def tidy(run: Path, keep: int) -> None:
    """Deletes all but the newest checkpoints, and what a run that was killed had half written or half deleted."""
    for old in whole(run)[:-keep]:
        discard(old)
    for leftover in (run / CHECKPOINTS).glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def chosen(resume: str) -> Path | None:
    """The checkpoint from which a run goes on, sound to the last byte; those after it are forgotten."""
    run = run_of(resume)
    folder = latest(run) if run == Path(resume) else Path(resume)
    if folder is None:
        return None
    if damage := damaged(folder):
        sound = [str(path) for path in whole(run) if path < folder and not damaged(path)]
        way = f"go on from the one before with --resume {sound[-1]}" if sound else "there is no sound one before it"
        raise UsageError(f"the checkpoint {folder} is damaged ({damage}); {way}")
    for later in whole(run):
        if later > folder:
            discard(later)
    return folder


def damaged(folder: Path) -> str | None:
    """The fault of a checkpoint's files, in words; None if there is none."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        for name, expected in sums.items():
            if digest(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def files(folder: Path) -> Iterator[str]:
    """Every file in a folder and below, by its path from there."""
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())


def step_of(folder: Path | None) -> int:
    """The step after which a checkpoint was written; 0 for none."""
    return int(folder.name.removeprefix("step_")) if folder else 0


def load_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state; random states are put back."""
    kept = state_file.read(folder, STATE)
    restore_random(kept["random"])
    return kept
