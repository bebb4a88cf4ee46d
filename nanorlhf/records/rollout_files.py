"""Rollouts as parquet files, one a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor

from nanorlhf.errors import UsageError, error_line
from nanorlhf.types import Prompt, Rollout, Sample, as_tensor

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
        ("versions", pyarrow.list_(pyarrow.int32())),  # of the weights that wrote each; null: the same wrote all
        ("stopped", pyarrow.bool_()),
        ("rewards", pyarrow.string()),  # JSON: by name
        ("reward", pyarrow.float64()),
        ("baseline", pyarrow.float64()),  # of the prompt's greedy sample, if there was one
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
            "columns": json.dumps(s.prompt.columns, default=str),  # which may hold half a character
            "completion": s.text,
            "prompt_ids": s.prompt.ids,
            "completion_ids": s.completion_ids,
            "own": s.own,
            "logprobs": s.engine_logprobs,
            "advantages": advantage,
            "versions": s.versions,
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
    """The file of a step's rollout."""
    return run / FOLDER / f"step_{step:06d}.parquet"


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
            raise UsageError(f"rollouts_from={folder!r}: {path} cannot be read: {error_line(error)}") from None
        if missing:
            raise UsageError(f"rollouts_from={folder!r}: {path} is no rollout: it has no {', '.join(sorted(missing))}")
    return files


def check_rollouts(folder: str, each: int, greedy: bool, vocabulary: int) -> None:
    """Refuses rollouts of other groups or tokens than a run has, or without rewards of `greedy` ones, by the first."""
    first = read(find_rollouts(folder)[0])
    sizes = set(first.group.bincount().tolist())
    if sizes != {each}:
        found = ", ".join(map(str, sorted(sizes)))
        raise UsageError(f"rollouts_from={folder!r} has groups of {found} samples, this run of {each}")
    if greedy and first.baselines is None:
        raise UsageError(f"rollouts_from={folder!r} has no rewards of greedy answers, which are this run's baseline")
    largest = max(max([*s.prompt.ids, *s.completion_ids]) for s in first.samples)
    if largest >= vocabulary:
        raise UsageError(f"rollouts_from={folder!r} has the token {largest}, and the model has {vocabulary}")


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
            versions=row["versions"],
            rewards=(rewards := json.loads(row["rewards"])),
            reward=row["reward"],
            returned=rewards.get("environment"),
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
