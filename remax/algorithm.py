"""ReMax (arXiv:2310.10505): the reward of the greedy answer to the same prompt is the baseline."""

from __future__ import annotations

from nanorlhf.algorithm import PolicyGradient, Samples
from nanorlhf.remax.config import ReMaxConfig
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, Rollout


class ReMax(PolicyGradient):
    """REINFORCE with the greedy answer as baseline; that answer is not trained on, and carries no KL."""

    name = "remax"
    config: ReMaxConfig

    def samples(self) -> Samples:
        return Samples(self.config.num_generations, greedy=True)

    def credit(self, rollout: Rollout) -> Credit:
        assert rollout.baselines is not None, "it asks for greedy samples"
        keep = self.counted(rollout) & ~rollout.baselines.isnan()
        baselines = rollout.baselines.nan_to_num(0.0)
        return Credit(self.returns(rollout) - baselines[rollout.sample], keep)


class ReMaxTrainer(Trainer):
    """Trains by ReMax; the arguments are those that TRL's users know."""

    algorithm_class = ReMax
    config_class = ReMaxConfig
