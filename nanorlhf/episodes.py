"""Every rollout kept in a file of its own, and training on rollouts that were kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from nanorlhf.errors import UsageError, told
from nanorlhf.metrics import Clock
from nanorlhf.rollout import Progress, as_tensor, shared
from nanorlhf.scoring import Scorer
from nanorlhf.team import team
from nanorlhf.types import Prompt, Rollout, Sample

FOLDER = "rollouts"
SCHEMA = pyarrow.schema(
    [
        ("group", pyarrow.int32()),
        ("index", pyarrow.int64()),
        ("prompt", pyarrow.string()),  # JSON: text or messages
        ("columns", pyarrow.string()),  # JSON: what else the dataset row held
        ("completion", pyarrow.string()),
        ("prompt_ids", pyarrow.list_(pyarrow.int32())),
        ("completion_ids", pyarrow.list_(pyarrow.int32())),
        ("own", pyarrow.list_(pyarrow.bool_())),  # null: the policy wrote all of it
        ("logprobs", pyarrow.list_(pyarrow.float32())),  # the engine's, of the policy's own tokens
        ("advantages", pyarrow.list_(pyarrow.float32())),  # of the same tokens; for those who read, not for training
        ("stopped", pyarrow.bool_()),
        ("rewards", pyarrow.string()),  # JSON: by name
        ("reward", pyarrow.float64()),
        ("baseline", pyarrow.float64()),  # of the prompt's greedy sample, where there was one
    ]
)


def keep(run: Path, step: int, rollout: Rollout, advantages: Tensor) -> None:
    """Writes a step's rollout, with the advantage `(N,)` that each of its tokens was given."""
    given = [part.tolist() for part in advantages.split(rollout.lengths.tolist())]
    baselines = [None] * len(rollout.samples) if rollout.baselines is None else rollout.baselines.tolist()
    rows = [
        {
            "group": group,
            "index": s.prompt.index,
            "prompt": json.dumps(s.prompt.text, ensure_ascii=False),
            "columns": json.dumps(s.prompt.columns, ensure_ascii=False, default=str),
            "completion": s.text,
            "prompt_ids": s.prompt.ids,
            "completion_ids": s.completion_ids,
            "own": s.own,
            "logprobs": s.engine_logprobs,
            "advantages": advantage,
            "stopped": s.stopped,
            "rewards": json.dumps(s.rewards),
            "reward": s.reward,
            "baseline": baseline,
        }
        for s, group, baseline, advantage in zip(rollout.samples, rollout.group.tolist(), baselines, given, strict=True)
    ]
    path = file_of(run, step)
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".draft")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, SCHEMA), draft, compression="zstd")
    draft.replace(path)


def file_of(run: Path, step: int) -> Path:
    """Where a step's rollout lies."""
    return run / FOLDER / f"step_{step:06d}.parquet"


class Saved:
    """A step's samples from files, the first again after the last; scored anew where rewards are named."""

    def __init__(self, folder: str, scorer: Scorer, group_size: int, vocabulary: int) -> None:
        self.files, self.scorer = find_rollouts(folder), scorer
        first = read(self.files[0])
        sizes = set(first.group.bincount().tolist())
        if sizes != {group_size}:
            found = ", ".join(map(str, sorted(sizes)))
            raise UsageError(f"rollouts_from={folder!r} has groups of {found} samples, this run of {group_size}")
        largest = max(max([*s.prompt.ids, *s.completion_ids]) for s in first.samples)
        if largest >= vocabulary:
            raise UsageError(f"rollouts_from={folder!r} has the token {largest}, and the model has {vocabulary}")

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """The rollout kept for this step."""
        with clock("rollout"):
            rollout = read(self.files[(step - 1) % len(self.files)])
        if self.scorer.rewards:
            with clock("reward"):
                groups = set(team().share(range(int(rollout.group.max()) + 1)))
                mine = [s for s, g in zip(rollout.samples, rollout.group.tolist(), strict=True) if g in groups]
                self.scorer.score(mine)
                rollout.samples = shared(mine)
                rollout.rewards = as_tensor(rollout.samples)
        return rollout


def find_rollouts(folder: str) -> list[Path]:
    """The rollouts that a run kept, by step; each must at least say that it is one."""
    where = Path(folder)
    where = where / FOLDER if (where / FOLDER).is_dir() else where
    files = sorted(where.glob("step_*.parquet"))
    if not files:
        raise UsageError(f"rollouts_from={folder!r}: there are no rollouts (step_*.parquet) in {where}")
    for path in files:
        try:
            missing = set(SCHEMA.names) - set(pyarrow.parquet.read_schema(path).names)
        except (OSError, pyarrow.ArrowException) as error:
            raise UsageError(f"rollouts_from={folder!r}: {path} cannot be read: {told(error)}") from None
        if missing:
            raise UsageError(f"rollouts_from={folder!r}: {path} is no rollout: it has no {', '.join(sorted(missing))}")
    return files


def read(path: Path) -> Rollout:
    """A rollout as it was."""
    rows: Sequence[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    samples = [
        Sample(
            Prompt(row["index"], row["prompt_ids"], json.loads(row["prompt"]), json.loads(row["columns"])),
            row["completion_ids"],
            row["logprobs"],
            row["stopped"],
            row["completion"],
            own=row["own"],
            rewards=json.loads(row["rewards"]),
            reward=row["reward"],
        )
        for row in rows
    ]
    greedy = any(row["baseline"] is not None for row in rows)
    return Rollout(
        samples=samples,
        group=torch.tensor([row["group"] for row in rows]),
        rewards=as_tensor(samples),
        baselines=torch.tensor([row["baseline"] for row in rows], dtype=torch.float32) if greedy else None,
        columns={"engine_logprobs": torch.tensor([x for s in samples for x in s.engine_logprobs])},
    )
