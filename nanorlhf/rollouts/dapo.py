"""Changes to a step's samples that DAPO (arXiv:2503.14476) makes: overlong ones pay, groups that teach nothing go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nanorlhf.formulas.advantages import has_spread
from nanorlhf.types import Rollout, Sample


def punish_overlong(samples: Sequence[Sample], limit: int, buffer: int) -> None:
    """The soft punishment: from 0 where the last `buffer` tokens begin to -1 at the limit; with 0 there is none."""
    for s in samples if buffer else ():
        excess = max(0, len(s.completion_ids) - (limit - buffer))
        if s.reward is not None:
            s.reward -= min(1.0, excess / buffer)


def refilled(rollout: Rollout, fresh: Rollout) -> Rollout:
    """As many groups as before: those with spread from both, then as many of the others as are wanting."""
    groups = int(rollout.group.max()) + 1
    both = joined(rollout, fresh)
    teaching = has_spread(both.rewards, both.group)
    order = sorted(range(int(both.group.max()) + 1), key=lambda g: (not teaching[both.group == g].any(), g))
    return only(both, order[:groups])


def joined(first: Rollout, second: Rollout) -> Rollout:
    """Both, with the second's groups numbered on."""
    baselines = None
    if first.baselines is not None and second.baselines is not None:
        baselines = torch.cat([first.baselines, second.baselines])
    return Rollout(
        samples=first.samples + second.samples,
        group=torch.cat([first.group, second.group + first.group.max() + 1]),
        rewards=torch.cat([first.rewards, second.rewards]),
        written=first.written + second.written,
        scored=first.scored + second.scored,
        columns={name: torch.cat([column, second.columns[name]]) for name, column in first.columns.items()},
        baselines=baselines,
    )


def only(rollout: Rollout, chosen: list[int]) -> Rollout:
    """These groups of it, numbered anew in the order given."""
    index = torch.cat([(rollout.group == g).nonzero().flatten() for g in chosen])
    tokens = torch.arange(int(rollout.lengths.sum())).split(rollout.lengths.tolist())  # of each sample
    at = torch.cat([tokens[i] for i in index.tolist()])
    sizes = torch.tensor([int((rollout.group == g).sum()) for g in chosen])
    return replace(
        rollout,
        samples=[rollout.samples[i] for i in index.tolist()],
        group=torch.arange(len(chosen)).repeat_interleave(sizes),
        rewards=rollout.rewards[index],
        columns={name: column[at] for name, column in rollout.columns.items()},
        baselines=None if rollout.baselines is None else rollout.baselines[index],
    )
