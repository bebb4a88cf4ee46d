"""Samples into rows: end to end, under a token budget, never padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nanorlhf.types import MicroBatch, Rollout


def pack(
    rollout: Rollout, keep: Tensor, weights: Tensor, token_budget: int, one_per_row: bool = False, together: int = 1
) -> Iterator[MicroBatch]:
    """Micro-batches that hold every sample of `keep (S,)` once; `together` adjacent ones share a row."""
    ends = torch.cumsum(rollout.lengths, 0).tolist()
    chosen = keep.nonzero().flatten().tolist()
    units = [chosen[i : i + together] for i in range(0, len(chosen), together)]
    lengths = [sum(rollout.samples[i].row_length for i in unit) for unit in units]
    rows = [[u] for u in range(len(units))] if one_per_row else fill(lengths, token_budget)
    for row in rows:
        members = [i for u in row for i in units[u]]
        yield build(rollout, members, [ends[i] for i in members], weights)


def divided(rollout: Rollout, chosen: Tensor, parts: int, together: int = 1) -> list[Tensor]:
    """(S,) disjoint parts of the samples `chosen (S,)`, as alike in tokens as they get: the longest to the emptiest."""
    index = chosen.nonzero().flatten().tolist()
    units = [index[i : i + together] for i in range(0, len(index), together)]
    lengths = [sum(rollout.samples[i].row_length for i in unit) for unit in units]
    shares, loads = [torch.zeros_like(chosen) for _ in range(parts)], [0] * parts
    for u in sorted(range(len(units)), key=lambda u: (-lengths[u], u)):
        least = loads.index(min(loads))
        shares[least][units[u]] = True
        loads[least] += lengths[u]
    return shares


def fill(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First fit, longest first; what is over the budget has a row of its own."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            rows.append([])
            room.append(budget)
            row = -1
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def build(rollout: Rollout, row: Sequence[int], ends: Sequence[int], weights: Tensor) -> MicroBatch:
    """One row from the samples at `row`, whose tokens end at `ends` in the rollout's flat columns."""
    ids: list[int] = []
    starts, predict_at, targets, owner, tokens, positions = [0], [], [], [], [], []
    for i, end in zip(row, ends, strict=True):
        s = rollout.samples[i]
        first = len(ids) + len(s.prompt.ids) - 1  # the last prompt token predicts the first completion token
        own = [k for k in range(len(s.completion_ids)) if s.own is None or s.own[k]]
        ids += s.prompt.ids + s.completion_ids
        positions.append(torch.arange(s.row_length))
        starts.append(len(ids))
        predict_at += [first + k for k in own]
        targets += [s.completion_ids[k] for k in own]
        owner += [i] * len(own)
        tokens.append(torch.arange(end - len(own), end))
    at = torch.cat(tokens)
    return MicroBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.cat(positions),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        predict_at=torch.tensor(predict_at, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        sample=torch.tensor(owner, dtype=torch.long),
        group=rollout.group[owner],
        tokens=at,
        weights=weights[at],
        columns={name: column[at] for name, column in rollout.columns.items()},
    )


def idle(rollout: Rollout) -> MicroBatch:
    """A row that passes through the model and teaches nothing: the shortest sample, with none of its tokens trained."""
    shortest = min(range(len(rollout.samples)), key=lambda i: rollout.samples[i].row_length)
    row = build(
        rollout, [shortest], [int(rollout.lengths[: shortest + 1].sum())], torch.zeros(int(rollout.lengths.sum()))
    )
    nothing = {
        name: getattr(row, name)[:0] for name in ("predict_at", "targets", "sample", "group", "tokens", "weights")
    }
    return replace(row, **nothing, columns={name: column[:0] for name, column in row.columns.items()})


def token_weights(lengths: Tensor, counted: Tensor, norm: str, max_length: int) -> Tensor:
    """(N,) each token's share of one update's loss; `lengths`, `counted (S,)`; other samples weigh 0."""
    samples = counted.sum().clamp(min=1).float()
    if norm == "token":
        share = torch.ones_like(lengths, dtype=torch.float32) / (lengths * counted).sum().clamp(min=1)
    elif norm == "sequence":
        share = 1 / (samples * lengths.clamp(min=1))
    else:
        share = torch.ones_like(lengths, dtype=torch.float32) / (samples * max_length)
    return torch.repeat_interleave(share * counted, lengths)
