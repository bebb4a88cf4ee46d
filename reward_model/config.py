"""The reward model's options."""

from __future__ import annotations

from nanorlhf.config.option import config
from nanorlhf.config.training import TrainConfig


@config
class RewardModelConfig(TrainConfig):
    """A reward model: of two answers one was chosen, or several were graded; the better one gets the higher score."""

    def validate(self) -> None:
        super().validate()
        self.require(not self.rewards, "reward_funcs", "a reward model writes nothing that could be judged")
        self.require(not self.shard_base, "shard_base", "a reward model is written as a whole in the end")
        alone = self.adapter_name_or_path is None
        self.require(alone, "adapter_name_or_path", "it has no score; merge it first (nanorlhf merge), and name that")
