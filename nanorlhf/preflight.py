"""Refuses models, algorithms and datasets that cannot serve, before anything costly starts."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from datasets import Dataset
from transformers import PretrainedConfig

from nanorlhf.algorithm import Algorithm, OnPolicy, PolicyGradient, Samples
from nanorlhf.config.names import run_of
from nanorlhf.config.option import split_names
from nanorlhf.config.task import TaskConfig
from nanorlhf.config.training import CriticConfig, OnPolicyConfig, PolicyGradientConfig, TrainConfig
from nanorlhf.data.prompts import AnswerPicker, first_rows
from nanorlhf.data.row_schemas import UnfitError
from nanorlhf.data.row_to_prompt import RowReader, require
from nanorlhf.data.sources import Rows, as_rows, load, only_split
from nanorlhf.engines.launch import check_engine, engine_name
from nanorlhf.environments.protocol import Environment, environment, find_environment, own_questions
from nanorlhf.environments.tools import ToolCalls, tool_environment
from nanorlhf.errors import UsageError, nearest
from nanorlhf.memory.activation_sizes import skeleton
from nanorlhf.memory.needs import RewardModelSize
from nanorlhf.memory.plan import Plan
from nanorlhf.memory.planning import plan_run
from nanorlhf.policy import loading
from nanorlhf.policy.loading import check_model
from nanorlhf.records.rollout_files import check_rollouts
from nanorlhf.scoring.reward import EPISODES, Reward, file_of, find_rewards
from nanorlhf.system.device import pick_device
from nanorlhf.system.terminal import launched, log
from nanorlhf.system.user_code import from_file

C = TypeVar("C", bound=TaskConfig)
COMPLETION, TOKEN, WORKER = 376, 8, 32 * 2**20  # bytes that an empty one, an id in a list, and a process take at least
ADAM = 16  # bytes of a weight that learns: itself, its gradient and two moments in float32


@dataclass(frozen=True, slots=True)
class Preflight:
    """Everything that a run is made of, checked before anything is loaded."""

    config: TrainConfig
    about: PretrainedConfig
    rewards: list[Reward]
    train: Rows
    held_out: Rows | None
    algorithm: type[Algorithm]
    environment: type[Environment] | None
    source: Literal["policy", "run", "dataset"]  # of samples: the policy, another run's rollouts, the rows' own answers
    generates: bool  # whether the policy writes what it is trained or evaluated on


def check(
    config: TrainConfig,
    model: Any,
    reward_funcs: Any,
    train: Any,
    held_out: Any,
    reader: AnswerPicker | None,
    algorithm: type[Algorithm],
    tools: Any = None,
) -> Preflight:
    """Looks at everything that was asked for; a mistake is a UsageError."""
    if config.resume and config.output_dir:
        stays = Path(config.output_dir).resolve() == run_of(config.resume).resolve()
        new = f"a new run goes on from its weights with adapter_name_or_path={config.resume!r}"
        config.require(stays, "output_dir", f"what is resumed goes on where it is, in {run_of(config.resume)}; {new}")
    if isinstance(config, PolicyGradientConfig) and (config.rollouts_from or config.partial_rollouts):
        given = config.importance_correction  # another policy wrote the samples, or a part of them
        config = dataclasses.replace(config, importance_correction="token" if given == "none" else given)
    replays = config.rollouts_from if isinstance(config, OnPolicyConfig) else None
    config, environment_class = environment_of(config, tools)
    rewards = rewards_of(config, reward_funcs, environment_class)
    chosen = find_algorithm(config, algorithm)
    check_sizes(config, chosen)
    check_partial(config, chosen, environment_class)
    source = "dataset" if reader else "run" if replays else "policy"
    if source == "policy" and not rewards:
        find_rewards([])
    about = check_model(config, model)
    check_replay(config, chosen, about)
    check_rank(config, about)
    if environment_class and train is None and not config.dataset_name:
        train, own = own_questions(environment_class, config, held_out is None)
        held_out = own if held_out is None else held_out
    train, held_out = load_datasets(config, rewards, reader, train, held_out)
    config = with_steps(config, train)
    generates = bool(rewards) and (source == "policy" or held_out is not None)
    if generates:
        check_engine(config, about)
    if config.shard_base:
        config.require(launched(), "shard_base", "there is one process; start several with accelerate launch")
        whole = engine_name(config) == "hf" and generates
        config.require(not whole, "shard_base", "the hf engine would keep a whole copy on every card; use engine vllm")
        config.require(model is None, "shard_base", "name the model, so that the engine can load it by itself")
    return Preflight(config, about, rewards, train, held_out, chosen, environment_class, source, generates)


def of_kind(args: Any, kind: type[C]) -> C:
    """The options, or their defaults; refuses those of another algorithm, or of another trainer."""
    if args is not None and not isinstance(args, kind):
        given, own = type(args), kind.__module__.removesuffix(".config")
        raise UsageError(f"args is a {given.__module__}.{given.__name__}: it takes {kind.__name__} of {own}")
    return kind() if args is None else args


def with_steps(config: TrainConfig, train: Rows) -> TrainConfig:
    """The steps that so many passes over the rows are; each row counts, whether it turns out to be of use or not."""
    if config.num_train_epochs is None:
        return config
    if not isinstance(train, Dataset):
        raise UsageError("num_train_epochs: a stream has no number of rows; say max_steps")
    steps = math.ceil(config.num_train_epochs * len(train) / config.prompts_per_step)
    log.info(f"num_train_epochs {config.num_train_epochs:g} is max_steps {steps:,} here, of {len(train):,} rows")
    return dataclasses.replace(config, max_steps=steps, num_train_epochs=None)


def check_sizes(config: TrainConfig, algorithm: type[Algorithm]) -> None:
    """Refuses a step, or workers, that this machine could not hold."""
    wanted = Samples(algorithm.together)
    if isinstance(config, OnPolicyConfig) and issubclass(algorithm, OnPolicy):
        wanted = algorithm(config).samples()
    check_size(config, {"prompts_per_step": config.prompts_per_step, "num_generations": wanted.each + wanted.greedy})
    config.require_memory("reward_workers", WORKER * config.workers, "such processes")


def check_partial(config: TrainConfig, algorithm: type[Algorithm], environment_class: type[Environment] | None) -> None:
    """Refuses partial rollouts where they cannot be."""
    if not (isinstance(config, PolicyGradientConfig) and config.partial_rollouts):
        return
    name, corrects = "partial_rollouts", issubclass(algorithm, PolicyGradient)
    config.require(corrects, name, f"{algorithm.__name__} is no PolicyGradient, whose loss corrects for older tokens")
    turns = "an episode of many turns is played to its end; leave out environment and tools"
    config.require(environment_class is None, name, turns)
    config.require(not launched(), name, "unfinished answers stay in one process, and there are several here")
    config.require(config.rollouts_from is None, name, "the answers of rollouts_from are finished")
    waits = "dynamic_sampling looks at a whole step and draws more, and partial rollouts end before"
    config.require(not config.dynamic_sampling, name, waits)
    least = -(-config.prompts_in_flight // config.prompts_per_step) - 1
    why = f"of {config.prompts_in_flight:,} prompts in flight a step takes {config.prompts_per_step:,}; say {least}"
    config.require(config.partial_max_age >= least, "partial_max_age", f"{why} at least")


def check_replay(config: TrainConfig, algorithm: type[Algorithm], about: PretrainedConfig) -> None:
    """Refuses another run's rollouts where this one cannot learn from them."""
    if not (isinstance(config, OnPolicyConfig) and config.rollouts_from and issubclass(algorithm, OnPolicy)):
        return
    drawn = "the samples of rollouts_from are drawn already, and none can take the place of groups without spread"
    config.require(not config.dynamic_sampling, "dynamic_sampling", drawn)
    wanted = algorithm(config).samples()
    check_rollouts(config.rollouts_from, wanted.each, wanted.greedy, about.get_text_config().vocab_size)


def check_size(config: TaskConfig, counts: Mapping[str, int]) -> None:
    """Refuses completions, as many as the product of `counts`, whose ids alone would not fit at their full length."""
    sizes = {**counts, "max_completion_length": config.max_completion_length}
    needed = math.prod(counts.values()) * (COMPLETION + TOKEN * config.max_completion_length)
    words = f"{' x '.join(f'{name} {size:,}' for name, size in sizes.items())} token ids"
    config.require_memory(max(sizes, key=lambda name: sizes[name]), needed, words)


def find_algorithm(config: TrainConfig, default: type[Algorithm]) -> type[Algorithm]:
    """A user's own algorithm from `path/to/file.py:Class`, or the one whose trainer this is."""
    spec = config.algorithm if isinstance(config, OnPolicyConfig) else None
    if spec is None:
        return default
    found = from_file(spec)
    if not (isinstance(found, type) and issubclass(found, OnPolicy)):
        raise UsageError(
            f"algorithm={spec!r} must be a class derived from OnPolicy or PolicyGradient in nanorlhf.algorithm"
        )
    config.require(
        re.fullmatch(r"\w[\w.-]*", found.name) is not None,
        "algorithm",
        f"folders are named after its name, which is {found.name!r}; use letters, digits, . _ and -",
    )
    if isinstance(config, CriticConfig) and "values" not in found(config).needs:
        raise UsageError(f"{found.name} asks for no values, so a critic is of no use; train it with another trainer")
    return found


def environment_of(config: C, tools: Any = None) -> tuple[C, type[Environment] | None]:
    """The environment that episodes are played in, if any; of tools the chat template must know too."""
    tools = split_names(config.tools) if tools is None else tools
    if not tools:
        return config, find_environment(config.environment) if config.environment else None
    config.require(config.environment is None, "environment", "tools are an environment themselves; choose one")
    found, described = tool_environment(tools)
    return dataclasses.replace(config, chat_template_kwargs=config.chat_template_kwargs | {"tools": described}), found


def rewards_of(config: TaskConfig, given: Any, environment_class: type[Environment] | None) -> list[Reward]:
    """The rewards given or named, behind what the environment itself gives; tools give none."""
    specs = config.rewards if given is None else given
    found = find_rewards(specs, config.reward_weights, config.reward_options, config.unsafe_code) if specs else []
    for name in config.reward_secrets:
        config.require(name in os.environ, "reward_secrets", f"the environment has no {name}")
    names = [reward.name for reward in found]
    for name in split_names(config.reward_together):
        config.require(name in names, "reward_together", f"it is none of this run's rewards; {nearest(name, names)}")
    played = environment_class is not None or (isinstance(config, OnPolicyConfig) and config.rollouts_from)
    for reward in found:
        if not played and (lacking := EPISODES.intersection(reward.required)):
            raise UsageError(f"reward {reward.name!r} needs {' and '.join(sorted(lacking))}: say environment or tools")
        seconds = reward.options.get("seconds", 0) if reward.ships else 0
        longer = f"reward {reward.name!r} itself takes up to {seconds:g} s (its option seconds), so it must be more"
        config.require(seconds < config.reward_timeout, "reward_timeout", longer)
    if environment_class is None or issubclass(environment_class, ToolCalls):
        return found
    return [Reward("environment", environment, file=file_of(environment_class.step)), *found]


def check_rank(config: TrainConfig, about: PretrainedConfig) -> None:
    """Refuses an adapter that main memory cannot hold, with gradients and moments; on a card the memory plan does."""
    new = not (config.full_finetuning or config.adapter_name_or_path)
    if new and config.lora_r > about.get_text_config().hidden_size and pick_device(config.device).type != "cuda":
        thinnest = skeleton(dataclasses.replace(config, lora_r=1), about)
        trained = config.lora_r * sum(p.numel() for p in thinnest.parameters() if p.requires_grad)
        config.require_memory("lora_r", ADAM * trained, f"{trained:,} weights, their gradients and moments")


def load_datasets(
    config: TrainConfig, rewards: Sequence[Reward], reader: AnswerPicker | None, train: Any, held_out: Any
) -> tuple[Rows, Rows | None]:
    """The datasets given or named, with every column that the rewards cannot do without."""
    if train is None and not config.dataset_name:
        raise UsageError("no dataset: say dataset_name (a hub name, a file, a folder, or arithmetic, built in)")
    if held_out is None and (config.dataset_test_name or (config.dataset_name and config.dataset_test_split)):
        name, subset = config.dataset_test_name or config.dataset_name, config.dataset_test_config
        subset = subset if config.dataset_test_name else subset or config.dataset_config
        held_out = load(name, subset, config.dataset_test_split or only_split(name) or "test", config.streaming)
    if train is None:
        train = load(config.dataset_name, config.dataset_config, config.dataset_train_split, config.streaming)
    if reader and rewards and held_out is None:
        raise UsageError("reward_funcs judge held-out prompts here, and there are none: say dataset_test_split")
    train = as_rows(train)
    check_rows(config, "training", train, [] if reader else rewards, reader)
    if held_out is not None:
        held_out = as_rows(held_out)
        check_rows(config, "held-out", held_out, rewards, reader)
    return train, held_out


def check_rows(
    config: TrainConfig, which: str, rows: Rows, rewards: Sequence[Reward], reader: AnswerPicker | None
) -> None:
    """Refuses rows that lack what is needed, by the first that can be read; says how they are read."""
    first = first_rows(rows, 100)
    reading = RowReader(config, first[0], reader is not None)
    names = list(reading.named(first[0]))
    for row in first:
        with suppress(UnfitError):
            read = reading(row)
            names = list(read.columns)
            if reading.form and reading.form.foreign:
                made = ", ".join(["prompt", *read.answers, *({"answer", "ground_truth"} & read.columns.keys())])
                log.info(f"{which} rows are read as {reading.form.name} ({made})")
            if reader:
                reader(read)
            break
    for reward in rewards:
        for column in reward.missing(names):
            require(column, names, f"reward {reward.name!r}")


def reward_models(rewards: Sequence[Reward], config: TaskConfig) -> list[RewardModelSize]:
    """The rewards that have something on the GPU, and say how much."""
    longest = config.max_prompt_length + config.max_completion_length
    classifiers = [getattr(reward.function, "classifier", None) for reward in rewards]
    return [RewardModelSize(*c.footprint(longest)) for c in classifiers if c is not None and hasattr(c, "footprint")]


def plan_command(config: TrainConfig, algorithm: type[Algorithm], reads: bool) -> Plan:
    """The plan of a command line as on CUDA, on any machine; `reads`: it learns from the dataset's own answers."""
    about = loading.check_model(config, None)
    check_rank(config, about)
    chosen = find_algorithm(config, algorithm)
    rewards = rewards_of(config, None, environment_of(config)[1])
    replays = config.rollouts_from if isinstance(config, OnPolicyConfig) else None
    evaluates = bool(rewards) and bool(config.dataset_test_name or config.dataset_test_split)
    engine = config.engine if config.engine == "hf" else "vllm"
    judges = reward_models(rewards, config)
    return plan_run(config, about, chosen(config), judges, engine if evaluates or not (reads or replays) else None)
