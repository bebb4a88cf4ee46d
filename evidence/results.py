"""The facts that every measurement keeps beside its figures, and how several figures are written."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanorlhf.records.directory import machine
from nanorlhf.system.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def where() -> dict[str, Any]:
    """The machine and the code."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    return {"commit": commit.strip(), "machine": machine(), "date": time.strftime("%Y-%m-%d")}


def write(path: Path, figures: Any) -> None:
    """Figures as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(figures, indent=1) + "\n")


def spread(runs: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """The median with the range behind it; a dash if a run never got there."""
    values = [run[key] for run in runs]
    if any(value is None for value in values):
        return f"- ({sum(value is None for value in values)} of {len(values)} never)"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})" if len(values) > 1 else f"{middle:{form}}"
