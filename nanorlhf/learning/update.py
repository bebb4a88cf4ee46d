"""The result of the optimizer steps that a rollout gives: figures, and the steps that were not taken."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nanorlhf.algorithm import Algorithm
from nanorlhf.learning.learner import Learned, Learner, PolicyLearner
from nanorlhf.learning.optimizer import sound
from nanorlhf.records.metrics import Averages, explained_variance
from nanorlhf.records.skipped_updates import describe
from nanorlhf.types import Rollout, SkippedUpdate

AVERAGED = ("kl", "entropy", "clip_fraction", "mismatch/mean_abs", "mismatch/max_abs")


class Update:
    """Optimizer steps, of the policy and of its critic, one after the other."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate, self.tokens = learning_rate, 0
        self.averages = Averages()
        self.steps: list[Learned] = []  # of the policy
        self.skipped: list[SkippedUpdate] = []

    def add(self, learner: Learner, learned: Learned, rollout: Rollout, chosen: Tensor) -> None:
        """Takes in a step on the samples `chosen (S,)`; of one that was not taken only why."""
        if not sound(learned.loss, learned.grad_norm):
            self.skipped.append(describe(learner.whose, learned.loss, learned.grad_norm, rollout, chosen))
            return
        self.averages = learned.averages
        if isinstance(learner, PolicyLearner):
            self.steps.append(learned)

    def metrics(self, algorithm: Algorithm, rollout: Rollout, trained: Tensor) -> dict[str, Any]:
        """Means over the policy's steps, and over the tokens of the samples `trained (S,)`."""
        averages, taken = self.averages.gather(), len(self.steps)
        tokens, columns = trained[rollout.sample], rollout.columns
        if {"logprobs", "ref_logprobs"} <= columns.keys() and "kl" not in averages.sums:
            averages.add("kl", algorithm.divergence(rollout)[tokens])
        means = averages.metrics(AVERAGED)
        if "values" in columns:
            means["value/explained_variance"] = explained_variance(*(columns[n][tokens] for n in ("values", "returns")))
        return {
            "loss": sum(step.loss for step in self.steps) / taken if taken else None,
            "grad_norm": sum(step.grad_norm for step in self.steps) / taken if taken else None,
            "learning_rate": self.learning_rate,
            "updates/left_out": len(self.skipped),
            **means,
            "kl_coef": algorithm.kl_coef,
            "tokens/trained": self.tokens,
        }
