"""A model that gives an answer one score instead of words: transformers' sequence classifier, learning from rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError
from nanorlhf.policy.attention import UnsupportedModelError
from nanorlhf.policy.loading import is_classifier, load
from nanorlhf.policy.policy import Policy
from nanorlhf.policy.self_check import eager, row, short_windows
from nanorlhf.system.device import pick_device
from nanorlhf.types import MicroBatch

NOISE = 0.02  # of scores by rows and by the model's own forward, as a share of their size


class Classifier(Policy):
    """A policy's body under a score; that of a sample is read where its last token would be predicted."""

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel | PeftModel | None = None,
        peft_config: LoraConfig | None = None,
    ) -> None:
        check_head(model)
        super().__init__(config, load_classifier(config) if model is None else model, peft_config)
        self.came_as_object = model is not None

    def outputs(self, batch: MicroBatch, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """(N,) a sample's score at its last token, 0 before it; there is no entropy."""
        last = batch.sample.diff(append=batch.sample.new_tensor([-1])) != 0
        tokens = torch.zeros(len(last), device=last.device)
        scores = self.scores(self.hidden(batch)[batch.predict_at[last]])
        return tokens.masked_scatter(last, scores), tokens[:0]

    def scores(self, hidden: Tensor) -> Tensor:
        """(n,) scores of hidden states (n, H)."""
        with self.autocast():
            return self.base.score(hidden)[:, 0].float()  # type: ignore[operator]

    @torch.no_grad()
    def verify(self) -> None:
        """Refuses a model whose packed rows would not give its own scores."""
        draw = torch.Generator().manual_seed(0)
        sizes = 24, 17, 11, 13
        first, prompt, one, two = (
            torch.randint(self.base.config.get_text_config().vocab_size, (n,), generator=draw).to(self.device)
            for n in sizes
        )
        samples = first, torch.cat([prompt, one]), torch.cat([prompt, two])
        with self.autocast(), short_windows(self.base, 8):
            packed = row(self.model, (first[:0], first), (prompt, one, two))
            with eager(self.base):
                own = torch.stack([self.base.base_model(s[None], use_cache=False)[0][0, -1] for s in samples])
        ends = torch.tensor([len(first), sum(sizes[:3]), sum(sizes)]) - 1
        off = (packed[ends] - own).abs().mean() / own.abs().mean()
        if not off <= NOISE:
            name = self.base.config.model_type
            raise UnsupportedModelError(f"{name}: packed rows differ from its own forward (by {off:.0%})")

    def save_whole(self, folder: Path) -> None:
        """The classifier with what it learned merged, as transformers loads it."""
        self.serving_copy("merged").save_pretrained(str(folder))  # type: ignore[operator]


def load_classifier(config: TrainConfig) -> PreTrainedModel:
    """The model under a score of one number: its own, or a new one that scores everything 0."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn that the score is a new one
    try:
        model: Any = load(config, pick_device(config.device), AutoModelForSequenceClassification, num_labels=1)
    finally:
        logging.set_verbosity(verbosity)
    check_head(model)
    if not any(name.endswith("ForSequenceClassification") for name in model.config.architectures or []):
        nn.init.zeros_(model.score.weight)
    model.score.float()  # it learns, as adapters do
    return model


def check_head(model: Any) -> None:
    """Refuses a model object that gives no single score."""
    if model is None:
        return
    weight = getattr(getattr(model, "score", None), "weight", None)
    if not is_classifier(model) or not isinstance(weight, Tensor) or len(weight) != 1:
        raise UsageError(
            "a reward model is a decoder under a linear `score` of one number: a causal model by its name, or an "
            "object made by AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)"
        )
