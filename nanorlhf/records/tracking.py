"""Writes a run's metrics.jsonl and samples.jsonl, and tells the trackers that accelerate knows."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import error_line
from nanorlhf.system.files import write_whole
from nanorlhf.system.terminal import log
from nanorlhf.types import Sample

UNSEEN = re.compile(
    r"[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)  # JSON itself escapes the rest
SHOWN_SAMPLES = 8  # rows of the table that trackers get


class RunLog:
    """Appends to the run directory and tells trackers; a resumed run forgets what came after its checkpoint."""

    def __init__(self, run: Path, config: TrainConfig, algorithm: str, step: int) -> None:
        self.run = run
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_after(run / name, step or -1)  # without a checkpoint step 0 comes again too
        self.metrics = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self.samples = (run / "samples.jsonl").open("a", encoding="utf-8")
        self.trackers = start_trackers(run, config, algorithm)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One step's metrics; what was not measured is null."""
        self.metrics.write(json.dumps(metrics, allow_nan=False) + "\n")
        self.metrics.flush()
        measured = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
        self.tell(lambda tracker: tracker.log(measured, step=step))

    def tell(self, what: Callable[[Any], object]) -> None:
        """Tells every tracker; one that raises is told no more, for its trouble is not the run's."""
        for tracker in list(self.trackers):
            try:
                what(tracker)
            except Exception as error:  # noqa: BLE001  a tracker may fail in any way
                self.trackers.remove(tracker)
                log.warning(
                    f"{tracker.name} failed, and is told no more ({error_line(error)}); everything is in {self.run}"
                )

    def log_samples(self, step: int, samples: Sequence[Sample], advantages: Sequence[float]) -> None:
        """Every sample of a step."""
        self.samples.writelines(sample_line(step, s, a) for s, a in zip(samples, advantages, strict=True))
        self.samples.flush()
        table = [[step, str(s.prompt.text), s.text, s.reward] for s in samples[:SHOWN_SAMPLES]]
        columns = ["step", "prompt", "completion", "reward"]
        self.tell(lambda t: t.name == "wandb" and t.log_table("samples", columns=columns, data=table, step=step))

    def settle(self) -> None:
        """Makes sure that what was written has reached the disk."""
        for file in (self.metrics, self.samples):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Ends the trackers' runs and closes the files."""
        self.tell(lambda tracker: tracker.finish())
        with self.metrics, self.samples:
            self.settle()


def sample_line(step: int, s: Sample, advantage: float) -> str:
    """A sample as a line of JSON, without a character that could move the cursor of a terminal."""
    row = {"step": step, "index": s.prompt.index, "prompt": s.prompt.text, "completion": s.text, "reward": s.reward}
    row |= {"rewards": s.rewards, "advantage": round(advantage, 6), "length": len(s.completion_ids)}
    row |= {"stopped": s.stopped} | ({"fault": s.fault} if s.fault else {}) | ({"extras": s.extras} if s.extras else {})
    return UNSEEN.sub(lambda c: f"\\u{ord(c[0]):04x}", json.dumps(row, ensure_ascii=False, default=str)) + "\n"


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
        try:
            if kind == "wandb":
                tags = [algorithm, *config.tags]
                about = {"id": run_id, "name": name, "tags": tags, "resume": "allow", "dir": str(run)}
                tracker = trackers.WandBTracker(config.project, **about, **wandb_mode())
            elif kind == "tensorboard":
                tracker = trackers.TensorBoardTracker("tensorboard", logging_dir=str(run))
            else:
                tracker = trackers.TrackioTracker(config.project, name=name, resume="allow")
            tracker.start()
            tracker.store_init_configuration(
                {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.to_dict().items()}
            )
        except Exception as error:  # noqa: BLE001  a tracker may fail in any way
            log.warning(f"{kind} cannot start, and is told nothing ({error_line(error)}); everything is in {run}")
        else:
            started.append(tracker)
    return started


def wandb_mode() -> dict[str, str]:
    """Offline if wandb could not upload, for want of an account or of a connection: its runs stay on disk."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        return {}
    try:
        reached = wandb.login(prompt=False)
    except Exception as error:  # noqa: BLE001  it looks whether the key is good, and anything may come of that
        log.warning(f"wandb cannot be reached, so its run stays on disk for `wandb sync` ({error_line(error)})")
        reached = False
    return {} if reached else {"mode": "offline"}
