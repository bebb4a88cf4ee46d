"""What is refused before anything costly starts: models, algorithms and datasets that cannot serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import AutoConfig

from nanorlhf import data
from nanorlhf.algorithm import Algorithm
from nanorlhf.config import shipped_model
from nanorlhf.demonstrations import Reader, read
from nanorlhf.engines.build import check_engine
from nanorlhf.environments import Environment, environment, find_environment, own_questions
from nanorlhf.errors import UsageError
from nanorlhf.options import OnPolicyConfig, PolicyGradientConfig, TrainConfig
from nanorlhf.plugins import from_file
from nanorlhf.policy import find_adapter
from nanorlhf.reward import Reward, find_rewards


@dataclass(frozen=True, slots=True)
class Entry:
    """What passed the door: everything a run is made of, before anything is loaded."""

    config: TrainConfig
    rewards: list[Reward]
    train: datasets.Dataset
    held_out: datasets.Dataset | None
    algorithm: type[Algorithm]
    environment: type[Environment] | None
    replays: str | None  # another run, whose rollouts are trained on
    samples: bool  # whether the policy writes what it trains on
    generates: bool  # or at least what it is evaluated on


def enter(
    config: TrainConfig,
    model: Any,
    reward_funcs: Any,
    train: datasets.Dataset | None,
    held_out: datasets.Dataset | None,
    reader: Reader | None,
    algorithm: type[Algorithm],
) -> Entry:
    """Looks at everything that was asked for; a mistake is a UsageError."""
    if isinstance(config, PolicyGradientConfig) and config.rollouts_from and config.importance_correction == "none":
        config = dataclasses.replace(config, importance_correction="token")  # another policy wrote them
    replays = config.rollouts_from if isinstance(config, OnPolicyConfig) else None
    environment_class = find_world(config)
    rewards = find_judges(config, reward_funcs, environment_class)
    samples = not (reader or replays)
    if samples and not rewards:
        find_rewards([])
    check_model(config, model)
    if environment_class and train is None and not config.dataset_name:
        train, held_out = own_questions(environment_class, config)
    train, held_out = load_datasets(config, rewards, reader, train, held_out)
    generates = bool(rewards) and (samples or held_out is not None)
    if generates:
        check_engine(config)
    chosen = find_algorithm(config, algorithm)
    return Entry(config, rewards, train, held_out, chosen, environment_class, replays, samples, generates)


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


def find_world(config: TrainConfig) -> type[Environment] | None:
    """The environment that episodes are played in, where one is asked for."""
    spec = config.environment if isinstance(config, OnPolicyConfig) else None
    return None if spec is None else find_environment(spec)


def find_judges(config: TrainConfig, given: Any, environment_class: type[Environment] | None) -> list[Reward]:
    """The rewards given or named, behind what the environment itself gives."""
    specs = config.rewards if given is None else given
    found = find_rewards(specs, config.reward_weights, config.reward_options, config.unsafe_code) if specs else []
    return [Reward("environment", environment), *found] if environment_class else found


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
