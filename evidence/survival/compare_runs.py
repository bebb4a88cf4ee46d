"""Whether a run's files are whole, and in what two runs of the same command differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml
from safetensors.torch import load_file

from nanorlhf.config import names
from nanorlhf.errors import error_line
from nanorlhf.records import checkpoint, rollout_files
from nanorlhf.records.directory import read_lines

CLOCKS = ("time/", "throughput/", "memory/", "value_init/seconds")  # metrics that no two runs share
PNG = b"\x00\x00\x00\x00IEND\xaeB`\x82"
READERS: dict[str, Callable[..., Any]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": lambda path: [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]],
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".parquet": pyarrow.parquet.read_table,
    ".safetensors": load_file,
}


def damage(run: Path, ended: bool) -> list[str]:
    """The damage to a run; one that has not ended may have drafts, and half a line at the end of its lines."""
    found: list[str] = []
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if any(part.startswith(".") or part.endswith(".draft") for part in name.parts):
            found += [f"{name} is a leftover"] if ended else []
        elif path.is_file():
            found += [f"{name}: {why}" for why in flaws(path, ended)]
    for folder in names.whole(run):
        found += [f"{folder.name}: {why}" for why in [checkpoint.damaged(folder)] if why]
    return found


def flaws(path: Path, ended: bool) -> Iterator[str]:
    """The flaws of a file."""
    if path.suffix == ".png":
        if not path.read_bytes().endswith(PNG):
            yield "the picture breaks off"
        return
    if ended and path.suffix == ".jsonl" and not path.read_bytes().endswith(b"\n"):
        yield "its last line breaks off"
    try:
        READERS.get(path.suffix, Path.read_bytes)(path)
    except Exception as error:  # noqa: BLE001  whatever a reader says of a broken file
        yield error_line(error)


def differences(one: Path, other: Path, tolerance: float = 0.0) -> list[str]:
    """In what two runs that ended differ; figures may by `tolerance`, and then weights too."""
    found = [f"only one has {name}" for name in sorted(file_names(one) ^ file_names(other))]
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [[timeless(row) for row in read_lines(run / name)] for run in (one, other)]
        if [row["step"] for row in rows[0]] != [row["step"] for row in rows[1]]:
            found.append(f"{name} has other steps")
        else:
            found += [f"{name}: line {at + 1}: {why}" for at, why in unlike(rows[0], rows[1], tolerance)]
    for path in sorted((one / rollout_files.FOLDER).glob("*.parquet")):
        if (other / rollout_files.FOLDER / path.name).exists():
            tables = [
                pyarrow.parquet.read_table(run / rollout_files.FOLDER / path.name).to_pylist() for run in (one, other)
            ]
            found += [f"{path.name}: row {at}: {why}" for at, why in unlike(tables[0], tables[1], tolerance)]
    if not tolerance:
        found += [f"{name} of the adapter" for name in unlike_tensors(one, other)]
    return found


def file_names(run: Path) -> set[str]:
    """Every file of a run, by its path from there."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a clock told."""
    return {name: value for name, value in row.items() if not name.startswith(CLOCKS)}


def unlike(rows: list[Any], others: list[Any], tolerance: float) -> Iterator[tuple[int, str]]:
    """Finds the rows that differ, and in what."""
    if len(rows) != len(others):
        yield min(len(rows), len(others)), f"{len(rows)} and {len(others)} rows"
    for at, (row, other) in enumerate(zip(rows, others, strict=False)):
        if different := [
            name for name in row.keys() | other.keys() if not near(row.get(name), other.get(name), tolerance)
        ]:
            yield at, f"other {', '.join(sorted(different))}"


def near(one: Any, other: Any, tolerance: float) -> bool:
    """Equal, figures within the tolerance."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(near(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return one == other or abs(one - other) <= tolerance
    return one == other


def unlike_tensors(one: Path, other: Path) -> list[str]:
    """Tensors of the final adapters that are not equal to the last bit."""
    first, second = (load_file(adapter(run)) for run in (one, other))
    return sorted(
        n for n in first.keys() | second.keys() if n not in first or n not in second or not first[n].equal(second[n])
    )


def adapter(run: Path) -> Path:
    """The file of a run's newest adapter."""
    newest = names.latest(run)
    assert newest is not None, f"{run} has no checkpoint"
    return newest / "adapter_model.safetensors"


def largest_gap(one: Path, other: Path, name: str) -> float:
    """The most by which a metric of two runs differs at any step."""
    pairs = zip(*(read_lines(run / "metrics.jsonl") for run in (one, other)), strict=True)
    return max(abs(a[name] - b[name]) for a, b in pairs if a.get(name) is not None and b.get(name) is not None)
