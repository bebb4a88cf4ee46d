"""A reward model by Bradley and Terry (doi:10.2307/2334029): the chosen answer is scored above the rejected one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanorlhf.algorithm import Algorithm, Loss
from nanorlhf.formulas import losses
from nanorlhf.policy.classifier import Classifier
from nanorlhf.reward_model.answers import ScoredAnswers, better_and_worse
from nanorlhf.reward_model.config import RewardModelConfig
from nanorlhf.system.files import whole_folder
from nanorlhf.system.terminal import log
from nanorlhf.trainer import Trainer
from nanorlhf.types import Credit, MicroBatch, Rollout

ALIKE = 0.1  # answers are alike in length if the shorter one lacks less than this share of the longer one


class RewardModel(Algorithm):
    """-log sigmoid(score of the chosen - score of the rejected)."""

    name = "reward_model"
    together = 2
    norm = "sequence"  # with the same loss at every token of a pair, the mean over pairs
    config: RewardModelConfig

    def credit(self, rollout: Rollout) -> Credit:
        """1 for what was chosen, -1 for what was rejected."""
        keep = torch.ones(len(rollout.samples), dtype=torch.bool)
        return Credit((2 * rollout.rewards - 1)[rollout.sample], keep)

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Loss:
        """The pairs' loss, which is DPO's of the scores; a classifier gives these in place of log-probabilities."""
        sign = batch.columns["advantages"]
        tokens, stats = losses.preference(logprobs, sign, batch.group, beta=1.0)
        return Loss(tokens, stats | by_length(stats["accuracy"], sign, batch.group))


def by_length(accuracy: Tensor, sign: Tensor, group: Tensor) -> dict[str, Tensor]:
    """The accuracy of taking the longer answer (P,), and that of the scores on pairs of alike length."""
    _, pair = group.unique(return_inverse=True)
    chosen, rejected = (torch.zeros_like(accuracy).index_add(0, pair, (sign * s > 0).float()) for s in (1, -1))
    alike = (chosen - rejected).abs() < ALIKE * torch.maximum(chosen, rejected)
    longer = 0.5 + 0.5 * (chosen - rejected).sign()
    return {"accuracy/of_longer": longer, "accuracy/alike_length": accuracy[alike]}


class RewardModelTrainer(Trainer):
    """Trains a reward model; the arguments are those that TRL's users know."""

    algorithm_class = RewardModel
    config_class = RewardModelConfig
    policy_class = Classifier
    source_class = ScoredAnswers
    reader = staticmethod(better_and_worse)
    policy: Classifier

    def __init__(
        self,
        model: Any = None,
        args: RewardModelConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
    ) -> None:
        super().__init__(model, None, args, train_dataset, eval_dataset, processing_class, peft_config)

    def load_models(self, model: Any, peft_config: Any) -> None:
        """Says beforehand what a classifier takes for padding."""
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        super().load_models(model, peft_config)
        self.policy.base.config.pad_token_id = self.tokenizer.pad_token_id

    def train(self) -> list[dict[str, Any]]:
        """Trains, and writes the classifier as a whole into the run's `model`, where `model:RUN` finds it."""
        history = super().train()
        if self.world.first:
            with whole_folder(self.run / "model") as draft:
                self.policy.save_whole(draft)
                self.tokenizer.save_pretrained(draft)
            log.info(f"the whole classifier is in {self.run / 'model'}; as a reward it is model:{self.run}")
        return history
