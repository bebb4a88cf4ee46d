"""Changes to a step's samples that DAPO (arXiv:2503.14476) makes: overlong ones pay, groups that teach nothing go."""

from __future__ import annotations

from collections.abc import Sequence

from nanorlhf.formulas.advantages import has_spread
from nanorlhf.types import Rollout, Sample


def punish_overlong(samples: Sequence[Sample], limit: int, buffer: int) -> None:
    """The soft punishment: from 0 where the last `buffer` tokens begin to -1 at the limit; with 0 there is none."""
    for s in samples if buffer else ():
        excess = max(0, len(s.completion_ids) - (limit - buffer))
        if s.reward is not None:
            s.reward -= excess / buffer


def refilled(rollout: Rollout, fresh: Rollout) -> Rollout:
    """As many groups as before: those with spread from both, then as many of the others as are wanting."""
    groups = int(rollout.group.max()) + 1
    both = rollout.followed_by(fresh)
    teaching = has_spread(both.rewards, both.group)
    order = sorted(range(int(both.group.max()) + 1), key=lambda g: (not teaching[both.group == g].any(), g))
    return both.groups(order[:groups])
