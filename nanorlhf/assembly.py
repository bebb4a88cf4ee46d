"""The parts of a run, put together."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from nanorlhf.config.training import TrainConfig
from nanorlhf.data.templates import read_tokenizer
from nanorlhf.engines.base import Sampling
from nanorlhf.errors import UsageError
from nanorlhf.policy.policy import Policy


def load_tokenizer(config: TrainConfig, model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model."""
    name = config.model_name_or_path if model is None else model.config.name_or_path
    return read_tokenizer(name, "model_name_or_path", config.trust_remote_code)


def how_to_sample(
    config: TrainConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]
) -> Sampling:
    """How completions are sampled, and what ends them: every end token that the model's generation config names."""
    named = getattr(policy.base, "generation_config", None) or GenerationConfig()
    ends = named.eos_token_id if isinstance(named.eos_token_id, list) else [named.eos_token_id]
    stop_ids = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
    if not stop_ids and not config.stop_strings:
        raise UsageError(
            "neither the model nor its tokenizer names an end token, so no completion could end; give a stop string"
        )
    strings = (*config.stop_strings, *stop)
    return Sampling(config.temperature, config.max_completion_length, tuple(sorted(stop_ids)), strings)
