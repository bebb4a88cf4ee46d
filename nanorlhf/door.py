"""What is refused before anything costly starts: models, algorithms and datasets that cannot serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from transformers import AutoConfig

from nanorlhf import data
from nanorlhf.algorithm import Algorithm
from nanorlhf.config import shipped_model
from nanorlhf.demonstrations import Reader, read
from nanorlhf.errors import UsageError
from nanorlhf.options import OnPolicyConfig, TrainConfig
from nanorlhf.plugins import from_file
from nanorlhf.policy import find_adapter
from nanorlhf.scoring import Reward


def find_algorithm(config: TrainConfig, default: type[Algorithm]) -> type[Algorithm]:
    """A user's own algorithm from `path/to/file.py:Class`, or the one whose trainer this is."""
    spec = config.algorithm if isinstance(config, OnPolicyConfig) else None
    if spec is None:
        return default
    found = from_file(spec)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise UsageError(
            f"algorithm={spec!r} must be a class derived from OnPolicy or PolicyGradient in nanorlhf.algorithm"
        )
    return found


def check_model(config: TrainConfig, model: Any) -> None:
    """Refuses a model or adapter that cannot be found, or a context that is too short, before weights are loaded."""
    if config.adapter_name_or_path:
        config.require(not config.full_finetuning, "lora", "there is an adapter to go on from; leave lora as it is")
        find_adapter(config.adapter_name_or_path)
    if model is None:
        if not config.model_name_or_path:
            raise UsageError("no model: say model_name_or_path (a Hugging Face name, a folder, or nanorlhf:adder)")
        try:
            about = AutoConfig.from_pretrained(
                shipped_model(config.model_name_or_path), trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UsageError(f"model_name_or_path={config.model_name_or_path!r} cannot be loaded: {first}") from None
    else:
        about = model.config
    context = getattr(about.get_text_config(), "max_position_embeddings", None)
    wanted = config.max_prompt_length + config.max_completion_length
    if context and wanted > context:
        raise UsageError(
            f"max_prompt_length={config.max_prompt_length} and max_completion_length={config.max_completion_length} "
            f"make {wanted} tokens, and the model takes {context}; shorten one"
        )


def load_datasets(
    config: TrainConfig,
    rewards: Sequence[Reward],
    reader: Reader | None,
    train: datasets.Dataset | None,
    held_out: datasets.Dataset | None,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The datasets given or named, with every column that the rewards cannot do without."""
    if train is None:
        if not config.dataset_name:
            raise UsageError("no dataset: say dataset_name (arithmetic, stories, a file, a folder or a hub name)")
        train = data.load(config.dataset_name, config.dataset_config, config.dataset_train_split)
        if held_out is None and config.dataset_test_split:
            held_out = data.load(config.dataset_name, config.dataset_config, config.dataset_test_split)
    rewarded = [train, held_out]
    if reader:
        if rewards and held_out is None:
            raise UsageError("reward_funcs judge held-out prompts here, and there are none: say dataset_test_split")
        train = read(train, reader, config.prompt_column)
        held_out = None if held_out is None else read(held_out, reader, config.prompt_column)
        rewarded = [held_out]
    for dataset in (d for d in rewarded if d is not None):
        data.require_column(dataset, config.prompt_column, "prompt_column")
        for reward in rewards:
            for column in reward.missing(dataset.column_names):
                data.require_column(dataset, column, f"reward {reward.name!r}")
    return train, held_out
