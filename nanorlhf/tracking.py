"""What a run leaves behind: metrics.jsonl, samples.jsonl, a learning curve, and any tracker that accelerate knows."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanorlhf.disk import write_whole
from nanorlhf.options import TrainConfig
from nanorlhf.types import Sample

SHOWN_SAMPLES = 8  # rows of the table that trackers get


class Tracker:
    """Appends to the run directory and tells trackers; a resumed run forgets what came after its checkpoint."""

    def __init__(self, run: Path, config: TrainConfig, algorithm: str, step: int) -> None:
        self.run = run
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_after(run / name, step or -1)  # without a checkpoint step 0 comes again too
        self.metrics = (run / "metrics.jsonl").open("a")
        self.samples = (run / "samples.jsonl").open("a")
        self.trackers = start_trackers(run, config, algorithm)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One step's metrics; what was not measured is null."""
        self.metrics.write(json.dumps(metrics, allow_nan=False) + "\n")
        self.metrics.flush()
        for tracker in self.trackers:
            tracker.log({k: v for k, v in metrics.items() if v is not None and k != "step"}, step=step)

    def log_samples(self, step: int, samples: Sequence[Sample], advantages: Sequence[float]) -> None:
        """Every sample of a step."""
        for s, advantage in zip(samples, advantages, strict=True):
            row = {
                "step": step,
                "index": s.prompt.index,
                "prompt": s.prompt.text,
                "completion": s.text,
                "reward": s.reward,
            }
            row |= {
                "rewards": s.rewards,
                "advantage": round(advantage, 6),
                "length": len(s.completion_ids),
                "stopped": s.stopped,
            }
            row |= ({"fault": s.fault} if s.fault else {}) | ({"extras": s.extras} if s.extras else {})
            self.samples.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        self.samples.flush()
        for tracker in self.trackers:
            if tracker.name == "wandb":
                rows = [[step, str(s.prompt.text), s.text, s.reward] for s in samples[:SHOWN_SAMPLES]]
                tracker.log_table("samples", columns=["step", "prompt", "completion", "reward"], data=rows, step=step)

    def close(self) -> None:
        """Ends the trackers' runs and closes the files."""
        for tracker in self.trackers:
            tracker.finish()
        self.metrics.close()
        self.samples.close()


def cut_after(path: Path, step: int) -> None:
    """Ends a file before the first line that is not whole, or of a step that a resumed run will take again."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        kept = 0
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)


def start_trackers(run: Path, config: TrainConfig, algorithm: str) -> list[Any]:
    """Trackers of accelerate's, each going on with the run that this directory belongs to."""
    if not config.trackers:
        return []
    from accelerate import PartialState
    from accelerate import tracking as trackers

    PartialState()
    identity = run / "trackers.json"
    if not identity.exists():
        write_whole(identity, json.dumps({"id": uuid.uuid4().hex[:12]}))
    run_id = json.loads(identity.read_text())["id"]
    name = config.run_name or run.name
    started: list[Any] = []
    for kind in config.trackers:
        if kind == "wandb":
            offline = {} if wandb_account() else {"mode": "offline"}
            tags = [algorithm, *config.tags]
            tracker = trackers.WandBTracker(
                config.project, id=run_id, name=name, tags=tags, resume="allow", dir=str(run), **offline
            )
        elif kind == "tensorboard":
            tracker = trackers.TensorBoardTracker("tensorboard", logging_dir=str(run))
        else:
            tracker = trackers.TrackioTracker(config.project, name=name, resume="allow")
        tracker.start()
        tracker.store_init_configuration(
            {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.to_dict().items()}
        )
        started.append(tracker)
    return started


def wandb_account() -> bool:
    """Whether wandb could upload; without an account its runs stay on disk, to be synced later."""
    import wandb

    return bool(os.environ.get("WANDB_MODE") or wandb.login(prompt=False))
