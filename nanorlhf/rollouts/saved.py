"""Training on rollouts that another run kept."""

from __future__ import annotations

import torch

from nanorlhf.algorithm import Samples
from nanorlhf.config.training import OnPolicyConfig
from nanorlhf.errors import UsageError
from nanorlhf.records.metrics import Clock
from nanorlhf.records.rollout_files import find_rollouts, read
from nanorlhf.rollouts.dapo import punish_overlong
from nanorlhf.rollouts.source import Source, shared
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.system.distributed import world
from nanorlhf.types import Progress, Rollout, as_tensor


class SavedRollouts(Source):
    """A step's samples from files, the first again after the last; scored anew if rewards are named."""

    def __init__(self, config: OnPolicyConfig, scorer: Scorer, wanted: Samples) -> None:
        self.files = find_rollouts(str(config.rollouts_from))
        self.config, self.scorer, self.wanted = config, scorer, wanted

    def rollout(self, step: int, clock: Clock, progress: Progress) -> Rollout:
        """The rollout kept for this step."""
        with clock("rollout"):
            rollout = read(self.files[(step - 1) % len(self.files)])
        if self.scorer.rewards:
            with clock("reward"):
                groups = set(world().share(range(int(rollout.group.max()) + 1)))
                mine = [s for s, g in zip(rollout.samples, rollout.group.tolist(), strict=True) if g in groups]
                self.scorer.score(mine)
                punish_overlong(mine, self.config.max_completion_length, self.config.overlong_buffer)
                rollout.samples, kept = shared(mine), rollout.rewards
                rollout.rewards = as_tensor(rollout.samples)
            both = ~(kept.isnan() | rollout.rewards.isnan())
            if self.wanted.greedy and not torch.allclose(kept[both], rollout.rewards[both]):
                raise UsageError(
                    f"rollouts_from={self.config.rollouts_from!r}: greedy answers, this run's baseline, are not kept, "
                    "so their rewards are that run's, and the samples' must be too; name no rewards, or the same"
                )
        return rollout
