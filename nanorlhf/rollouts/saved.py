"""Every rollout kept in a file of its own, and training on rollouts that were kept."""

from __future__ import annotations

from nanorlhf.errors import UsageError
from nanorlhf.records.metrics import Clock
from nanorlhf.records.rollout_files import find_rollouts, read
from nanorlhf.rollouts.source import Source, shared
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.system.distributed import world
from nanorlhf.types import Progress, Rollout, as_tensor


class SavedRollouts(Source):
    """A step's samples from files, the first again after the last; scored anew if rewards are named."""

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
                groups = set(world().share(range(int(rollout.group.max()) + 1)))
                mine = [s for s, g in zip(rollout.samples, rollout.group.tolist(), strict=True) if g in groups]
                self.scorer.score(mine)
                rollout.samples = shared(mine)
                rollout.rewards = as_tensor(rollout.samples)
        return rollout
