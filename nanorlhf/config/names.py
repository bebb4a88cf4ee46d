"""Names of models, runs and checkpoints as folders."""

from __future__ import annotations

from pathlib import Path

from nanorlhf.config.pretrained import smollm2
from nanorlhf.errors import UsageError, nearest

CHECKPOINTS = "checkpoints"


def whole(run: Path) -> list[Path]:
    """A run's checkpoints, the newest last."""
    return sorted((run / CHECKPOINTS).glob("step_*"))


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    pointer = run / CHECKPOINTS / "latest"
    if not pointer.is_file():
        return None
    named = pointer.parent / pointer.read_text().strip()
    return named if named.is_dir() else next(reversed(whole(run)), None)


def run_of(resume: str) -> Path:
    """The run that is to go on, whether it was named or one of its checkpoints."""
    path = Path(resume)
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def shipped_model(name: str) -> str:
    """The folder of a model that comes with the package (`nanorlhf:adder`, `nanorlhf:smollm2` with another one) or that
    a run trained, else the name."""
    if name and (newest := latest(Path(name))):
        return str(newest)
    if not name.startswith("nanorlhf:"):
        return name
    if name == "nanorlhf:smollm2":
        return str(smollm2())
    folder = Path(__file__).parents[1] / "models"
    path = folder / name.removeprefix("nanorlhf:")
    if not path.is_dir():
        known = ["smollm2", *(p.name for p in folder.iterdir())]
        raise UsageError(f"no shipped model {name!r}: {nearest(path.name, known)}")
    return str(path)
