"""The shares of a rollout that several processes take, and rows for those that have none left."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nanorlhf.learning.packing import build, cut, size
from nanorlhf.types import MicroBatch, Rollout


def divided(rollout: Rollout, chosen: Tensor, parts: int, together: int = 1, one_per_row: bool = False) -> list[Tensor]:
    """(S,) disjoint parts of the samples `chosen (S,)`, as alike in tokens as they get: the longest to the emptiest.

    Prompts are cut into pieces as large as leaves no part with much more than the others.
    """
    even = size(rollout, chosen.nonzero().flatten().tolist()) // parts
    ways = []
    for budget in [0] if one_per_row else [even, even // 2, even // 4]:
        shares: list[list[int]] = [[] for _ in range(parts)]
        for piece in sorted(cut(rollout, chosen, budget, together), key=lambda piece: -size(rollout, piece)):
            least = min(shares, key=lambda share: size(rollout, share))
            least += piece
            least.sort()  # a prompt's pieces meet again
        ways.append(shares)
    best = min(ways, key=lambda shares: max(size(rollout, share) for share in shares))
    return [torch.zeros_like(chosen).index_fill(0, torch.tensor(share, dtype=torch.long), True) for share in best]


def idle(rollout: Rollout) -> MicroBatch:
    """A row that passes through the model and teaches nothing: the shortest sample, with none of its tokens trained."""
    shortest = min(range(len(rollout.samples)), key=lambda i: rollout.samples[i].row_length)
    ends = rollout.lengths.cumsum(0).tolist()
    row = build(rollout, [shortest], ends, torch.zeros(ends[-1]))
    nothing = {
        name: getattr(row, name)[:0] for name in ("predict_at", "targets", "sample", "group", "tokens", "weights")
    }
    return replace(row, **nothing, columns={name: column[:0] for name, column in row.columns.items()})
