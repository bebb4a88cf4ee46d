"""Samples into rows: end to end, under a token budget, never padded, what they share of their prompts once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from operator import eq

import torch
from torch import Tensor

from nanorlhf.segments import Segments
from nanorlhf.types import MicroBatch, Rollout

GATHERED = 4  # keys gathered for each token of a row: for so many there is memory
LARGER = 8  # times what a key and its value take, at least, is all else that a layer keeps of a token
WORTH = 0.1  # of the tokens: if so many go, what all prompts begin with passes through the model once a row


def pack(
    rollout: Rollout, keep: Tensor, weights: Tensor, token_budget: int, together: int = 1, at_once: int = 0
) -> Iterator[MicroBatch]:
    """Micro-batches of the samples `keep (S,)`, `together` adjacent ones in one; a budget of 0 parts all others."""
    ends = torch.cumsum(rollout.lengths, 0).tolist()
    common = beginning(rollout, keep) if token_budget else 0
    budget = token_budget - common
    pieces = cut(rollout, keep, budget, together, common, at_once)
    for row in fill([size(rollout, piece, common, at_once) for piece in pieces], budget):
        yield build(rollout, [i for p in row for i in pieces[p]], ends, weights, common)


def beginning(rollout: Rollout, chosen: Tensor) -> int:
    """Tokens that all prompts of the samples `chosen (S,)` begin with, if they are worth it; never a whole prompt."""
    index = chosen.nonzero().flatten().tolist()
    prompts = sorted(prompt[:-1] for prompt, _ in families(rollout, index)) or [[]]
    common = len(list(takewhile(bool, map(eq, prompts[0], prompts[-1]))))  # the first and the last of a sorted list
    return common if common * (len(prompts) - 1) > WORTH * size(rollout, index) else 0


def cut(
    rollout: Rollout, chosen: Tensor, budget: int, together: int = 1, common: int = 0, at_once: int = 0
) -> list[list[int]]:
    """The samples of `chosen (S,)` prompt by prompt, in pieces under the budget, or of `together` if those are over."""
    index = chosen.nonzero().flatten().tolist()
    units = [index[i : i + together] for i in range(0, len(index), together)]
    pieces: list[list[int]] = []
    for _, family in groupby(units, lambda unit: rollout.samples[unit[0]].prompt.ids):
        pieces.append([])
        for unit in family:
            if pieces[-1] and size(rollout, pieces[-1] + unit, common, at_once) > budget:
                pieces.append([])
            pieces[-1] += unit
    return pieces


def families(rollout: Rollout, row: Iterable[int]) -> list[tuple[list[int], list[int]]]:
    """Prompts, each with the adjacent samples of a row that answer it."""
    return [(prompt, list(answers)) for prompt, answers in groupby(row, lambda i: rollout.samples[i].prompt.ids)]


def size(rollout: Rollout, row: Iterable[int], common: int = 0, at_once: int = 0) -> int:
    """Tokens beyond a common beginning, a prompt once; more if many answers, beyond `at_once`, gather its keys."""
    tokens = keys = 0
    for prompt, answers in families(rollout, row):
        written = sum(len(rollout.samples[i].completion_ids) for i in answers)
        tokens += len(prompt) - common + written
        keys += len(prompt) * (1 + len(answers) * (len(answers) > 1 and len(prompt) + written > at_once)) + written
    return max(tokens, -(-(LARGER * tokens + keys) // (LARGER + GATHERED)))


def fill(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First fit, longest first; what is over the budget has a row of its own."""
    rows, room = list[list[int]](), list[int]()
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(budget)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def build(rollout: Rollout, row: Sequence[int], ends: Sequence[int], weights: Tensor, common: int = 0) -> MicroBatch:
    """One row from the samples at `row`; every sample's tokens end at `ends` in the rollout's flat columns."""
    ids = rollout.samples[row[0]].prompt.ids[:common]
    lengths: list[tuple[int, list[int]]] = []
    predict_at, targets, owner, tokens, positions = [], [], [], [], [torch.arange(common)]
    for prompt, answers in families(rollout, row):
        lengths.append((len(prompt) - common, [len(rollout.samples[i].completion_ids) for i in answers]))
        positions.append(torch.arange(common, len(prompt)))
        ids += prompt[common:]
        last = len(ids) - 1  # it predicts the first token of every answer
        for i in answers:
            s = rollout.samples[i]
            own = [k for k in range(len(s.completion_ids)) if s.own is None or s.own[k]]
            predict_at += [len(ids) + k - 1 if k else last for k in own]
            positions.append(torch.arange(len(prompt), s.row_length))
            ids += s.completion_ids
            targets += [s.completion_ids[k] for k in own]
            owner += [i] * len(own)
            tokens.append(torch.arange(ends[i] - len(own), ends[i]))
    at = torch.cat(tokens)
    return MicroBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.cat(positions),
        segments=Segments.of(lengths, common),
        predict_at=torch.tensor(predict_at, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        sample=torch.tensor(owner, dtype=torch.long),
        group=rollout.group[owner],
        tokens=at,
        weights=weights[at],
        columns={name: column[at] for name, column in rollout.columns.items()},
    )


def token_weights(lengths: Tensor, counted: Tensor, norm: str, max_length: int) -> Tensor:
    """(N,) each token's share of one update's loss; `lengths`, `counted (S,)`; other samples weigh 0."""
    samples = counted.sum().clamp(min=1).float()
    if norm == "sequence":
        share = 1 / (samples * lengths.clamp(min=1))
    else:
        whole = (lengths * counted).sum().clamp(min=1) if norm == "token" else samples * max_length
        share = torch.ones_like(lengths, dtype=torch.float32) / whole
    return torch.repeat_interleave(share * counted, lengths)
