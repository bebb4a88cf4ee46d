"""The samples of a run on a page: the spread of all of them, and as many in full as stay quick to browse."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet

from nanorlhf.records.directory import RunRecord
from nanorlhf.records.metrics import finite
from nanorlhf.records.rollout_files import file_of
from nanorlhf.scripts.reporting.token_texts import Pieces, tokenizer_of

LIMIT = 10_000  # samples in full
TOKENS = 2_000_000  # in all of them: some 20 MB of page
BINS = 24


@dataclass(frozen=True, slots=True)
class Line:
    """The place of a sample in samples.jsonl, and what is known of it without its text."""

    at: int  # byte
    step: int
    number: int  # in its step
    index: int
    reward: float | None
    length: int


@dataclass(slots=True)
class Excerpts:
    """The samples of a run that are shown, as plain JSON values."""

    facts: dict[str, Any]
    tokens: dict[int, list[Any]] = field(default_factory=dict)  # step -> a sample each


def excerpts(record: RunRecord, limit: int = LIMIT) -> Excerpts:
    """Those of a run that may have ended, go on, or have kept no samples at all."""
    path = record.folder / "samples.jsonl"
    lines = list(scan(path))
    chosen = choose(lines, limit, TOKENS)
    found = Excerpts(columns(path, chosen))
    found.facts |= {"all": len(lines), "spread": {"reward": rewards(lines), "length": lengths(lines)}, "pieces": []}
    files = {step: file_of(record.folder, step) for step in {line.step for line in chosen}}
    if any(file.is_file() for file in files.values()) and (tokenizer := tokenizer_of(record)):
        pieces = Pieces(tokenizer)
        for step, group in groupby(chosen, key=lambda line: line.step):
            if files[step].is_file():
                found.tokens[step] = read_tokens(files[step], list(group), pieces)
        found.facts["pieces"] = [pieces.texts, pieces.counts]
    return found


def scan(path: Path) -> Iterator[Line]:
    """Every whole line, one at a time: the file of a long run does not fit in memory."""
    if not path.is_file():
        return
    at, step, number = 0, -1, 0
    with path.open("rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                return
            row = json.loads(text)
            step, number = row["step"], number + 1 if row["step"] == step else 0
            yield Line(at, step, number, row["index"], finite(row["reward"]), row["length"])
            at += len(text)


def choose(lines: Sequence[Line], limit: int, tokens: int) -> list[Line]:
    """Whole groups: of the first and the last step, then from all steps alike, prompts that come again first."""
    groups = [list(group) for _, group in groupby(lines, key=lambda line: (line.step, line.index))]
    comes = Counter(group[0].index for group in groups)
    by_step: dict[int, list[list[Line]]] = defaultdict(list)
    for group in groups:
        by_step[group[0].step].append(group)
    steps = list(by_step)
    order = []
    for position, step in enumerate(steps):
        ranked = sorted(by_step[step], key=lambda group: -comes[group[0].index])
        order += [(step not in (steps[0], steps[-1]), rank, scattered(position), g) for rank, g in enumerate(ranked)]
    chosen: list[Line] = []
    for *_, group in sorted(order, key=lambda entry: entry[:3]):
        if len(chosen) + len(group) <= limit and (cost := sum(line.length for line in group)) <= tokens:
            chosen += group
            tokens -= cost
    return sorted(chosen, key=lambda line: line.at)


def scattered(position: int) -> int:
    """Numbers whose order jumps about, so that the first few lie far apart: bits read backward."""
    return int(f"{position:032b}"[::-1], 2)


def columns(path: Path, chosen: Sequence[Line]) -> dict[str, Any]:
    """The samples' facts and texts, a list each; prompts, which come again and again, once."""
    prompts: dict[str, int] = {}
    names = ("step", "number", "index", "prompt", "completion", "reward", "rewards", "advantage", "length", "stopped")
    table: dict[str, list[Any]] = {name: [] for name in (*names, "fault", "extras")}
    if chosen:
        with path.open("rb") as file:
            for line in chosen:
                file.seek(line.at)
                row = json.loads(file.readline())
                key = json.dumps(messages(row["prompt"]), ensure_ascii=False)
                row |= {"number": line.number, "prompt": prompts.setdefault(key, len(prompts))}
                row |= {"fault": row.get("fault"), "extras": list(worded(row.get("extras") or {}).items())}
                row["rewards"] = [[name, finite(value)] for name, value in row["rewards"].items()]
                for name, values in table.items():
                    values.append(finite(row[name]))
    return table | {"prompts": [json.loads(key) for key in prompts]}


def messages(prompt: Any) -> list[list[str]]:
    """A prompt as roles and texts; plain text has no role."""
    if isinstance(prompt, str):
        return [["", prompt]]
    return [[str(m.get("role", "")), said(m)] for m in prompt]


def said(message: dict[str, Any]) -> str:
    """The text of a message, with whatever else it holds."""
    content = message.get("content")
    others = {k: v for k, v in message.items() if k not in ("role", "content") and v}
    words = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) if content else ""
    return "\n".join([words, *(f"{k}: {v}" for k, v in worded(others).items())]) if others else words


def worded(values: dict[str, Any]) -> dict[str, str]:
    """Any values as text."""
    return {str(k): v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}


def read_tokens(path: Path, chosen: Sequence[Line], pieces: Pieces) -> list[Any]:
    """Each sample's pieces, and of its tokens the engine's log-probability and the advantage, None for another's."""
    file = pyarrow.parquet.ParquetFile(path)
    names = [n for n in ("index", "completion_ids", "own", "logprobs", "advantages") if n in file.schema_arrow.names]
    table = file.read(columns=names)
    if table.num_rows <= max(line.number for line in chosen):
        return [None] * len(chosen)
    rows = table.take([line.number for line in chosen]).to_pylist()
    return [
        tokens_of(row, pieces) if row["index"] == line.index else None for row, line in zip(rows, chosen, strict=True)
    ]


def tokens_of(row: dict[str, Any], pieces: Pieces) -> list[Any]:
    """One sample's; an advantage that all tokens share is said once."""
    ids, own = row["completion_ids"], row["own"] or [True] * len(row["completion_ids"])
    advantages = row.get("advantages")
    if advantages and len(set(advantages)) == 1:
        advantages = finite(advantages[0])
    elif advantages:
        advantages = placed(advantages, own)
    return [pieces.of(ids), placed(row["logprobs"], own), advantages]


def placed(values: Sequence[float], own: Sequence[bool]) -> list[float | None]:
    """The values of the policy's own tokens where these stand."""
    rest = iter(values)
    return [finite(round(next(rest), 4)) if mine else None for mine in own]


def rewards(lines: Sequence[Line]) -> dict[str, Any]:
    """The spread of rewards at each step: by value if there are few, else in bins."""
    values = sorted({line.reward for line in lines if line.reward is not None})
    if len(values) <= BINS // 2:
        return spread(
            [(line.step, values.index(line.reward)) for line in lines if line.reward is not None], values, False
        )
    return binned([(line.step, line.reward) for line in lines if line.reward is not None], values[0], values[-1])


def lengths(lines: Sequence[Line]) -> dict[str, Any]:
    """The spread of lengths at each step."""
    longest = max((line.length for line in lines), default=0)
    width = math.ceil((longest + 1) / BINS)
    return binned([(line.step, float(line.length)) for line in lines], 0, width * BINS)


def binned(pairs: Sequence[tuple[int, float]], low: float, high: float) -> dict[str, Any]:
    """Counts in equal bins."""
    size = (high - low) / BINS or 1.0
    edges = [low + size * i for i in range(BINS + 1)]
    return spread([(step, min(int((value - low) / size), BINS - 1)) for step, value in pairs], edges, True)


def spread(pairs: Sequence[tuple[int, int]], marks: Sequence[float], edges: bool) -> dict[str, Any]:
    """Counts by step and bin."""
    counts: dict[int, list[int]] = {}
    for step, place in pairs:
        counts.setdefault(step, [0] * (len(marks) - edges))[place] += 1
    return {"steps": list(counts), "counts": list(counts.values()), "marks": list(marks), "edges": edges}
