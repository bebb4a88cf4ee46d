"""The run directory: made with care, never overwritten unasked."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from nanorlhf.errors import UsageError
from nanorlhf.options import TrainConfig


def prepare(config: TrainConfig, algorithm: str) -> Path:
    """The directory of this run, new or to be continued, with its options in `config.yaml`."""
    run = Path(config.output_dir or config.resume or f"runs/{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume and not (run / "config.yaml").is_file():
        raise UsageError(
            f"resume={config.resume!r}: there is no run to continue ({run / 'config.yaml'} does not exist)"
        )
    if run.is_dir() and any(run.iterdir()) and not config.resume:
        clear(run, config.overwrite_output_dir)
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output_dir={str(run)!r} cannot be written: {error.strerror}") from None
    if not os.access(run, os.W_OK):
        raise UsageError(f"output_dir={str(run)!r} cannot be written: permission denied")
    options = config.to_dict() | {"resume": None, "output_dir": str(run)}
    (run / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    return run


def clear(run: Path, allowed: bool) -> None:
    """Empties an earlier run's directory where that was asked for, and nothing but a run's."""
    if not allowed:
        raise UsageError(
            f"output_dir={str(run)!r} is not empty: --resume {run} goes on with it, --overwrite_output_dir replaces it"
        )
    if not (run / "config.yaml").is_file():
        raise UsageError(
            f"output_dir={str(run)!r} holds files that are no run of ours, so it is not deleted; choose another"
        )
    shutil.rmtree(run)


def read_metrics(run: Path, step: int) -> list[dict[str, Any]]:
    """What the run logged up to `step`; nothing for a new one."""
    path = run / "metrics.jsonl"
    if not step or not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["step"] <= step]
