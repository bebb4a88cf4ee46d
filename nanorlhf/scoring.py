"""Completions to rewards: functions found by name, called with the dataset's columns, checked."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanorlhf.errors import RewardError, UsageError, nearest
from nanorlhf.plugins import from_file, is_file_spec
from nanorlhf.types import Sample

RewardFunction = Callable[..., Any]
ALWAYS = {"prompts", "completions", "completion_ids"}  # what every reward function may ask for, beside the columns


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function with its name and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0

    def missing(self, columns: Iterable[str]) -> list[str]:
        """Arguments it cannot do without that neither the trainer nor the dataset has."""
        required = [
            p.name
            for p in inspect.signature(self.function).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        return [name for name in required if name not in ALWAYS and name not in columns]


def find_rewards(
    specs: Any, weights: Sequence[float] | None = None, options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Reward]:
    """Rewards from functions, names, `path/to/file.py:function`, or a list of these, with options by reward name."""
    specs = list(specs) if isinstance(specs, list | tuple) else [specs]
    if not specs:
        raise UsageError(
            f"no reward: name one in reward_funcs ({', '.join(known_rewards())}), or path/to/file.py:function"
        )
    if weights is not None and len(weights) != len(specs):
        raise UsageError(f"reward_weights={list(weights)}: there are {len(specs)} rewards, and each takes one weight")
    weights = [1.0] * len(specs) if weights is None else weights
    names, options = [name_of(spec) for spec in specs], options or {}
    if len(set(names)) < len(names):
        raise UsageError(f"reward_funcs={names}: each needs a name of its own, for the metrics")
    for name in options:
        if name not in names:
            raise UsageError(f"reward_options: {name!r} is none of this run's rewards; {nearest(name, names)}")
    return [
        Reward(name, with_options(name, find(spec), options.get(name, {})), weight)
        for name, spec, weight in zip(names, specs, weights, strict=True)
    ]


def with_options(name: str, function: RewardFunction, options: Mapping[str, Any]) -> RewardFunction:
    """The function with its options set, keyword-only parameters that have a default; its module's `check` sees all."""
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    for option in options:
        if option not in known:
            raise UsageError(f"reward_options: {name!r} has no option {option!r}; {nearest(option, known)}")
    check = getattr(inspect.getmodule(function), "check", None)
    if check is not None:
        check(**known | options)
    return partial(function, **options) if options else function


def name_of(spec: str | RewardFunction) -> str:
    """What the metrics call a reward."""
    if callable(spec):
        return getattr(spec, "__name__", type(spec).__name__)
    return spec.rpartition(":")[2] if is_file_spec(spec) else spec.partition(":")[0]


def find(spec: str | RewardFunction) -> RewardFunction:
    """A reward function by its name, or by the file that defines it."""
    if callable(spec):
        return spec
    if is_file_spec(spec):
        return from_file(spec)
    maker, _, argument = spec.partition(":")
    if maker not in known_rewards():
        raise UsageError(f"unknown reward {spec!r}: {nearest(maker, known_rewards())}")
    found = getattr(importlib.import_module(f"nanorlhf.rewards.{maker}"), maker)
    return found(argument) if argument else found


def known_rewards() -> list[str]:
    """The rewards that come with the package: one file each, named after its function."""
    folder = importlib.import_module("nanorlhf.rewards").__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def score(rewards: Sequence[Reward], samples: Sequence[Sample]) -> None:
    """Fills each sample's rewards, and its total: None where no function could score it."""
    if not samples:
        return
    for reward in rewards:
        for sample, value in zip(samples, call(reward, samples), strict=True):
            sample.rewards[reward.name] = value
    for sample in samples:
        terms = [(r.weight, sample.rewards[r.name]) for r in rewards]
        scored = [weight * value for weight, value in terms if value is not None]
        sample.reward = sum(scored) if scored else None


def reward_arguments(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """What reward functions receive: `prompts`, `completions`, `completion_ids` and every dataset column."""
    arguments: dict[str, list[Any]] = {
        name: [s.prompt.columns.get(name) for s in samples] for name in samples[0].prompt.columns
    }
    arguments["prompts"] = [s.prompt.text for s in samples]
    arguments["completions"] = [as_completion(s) for s in samples]
    arguments["completion_ids"] = [s.completion_ids for s in samples]
    return arguments


def as_completion(sample: Sample) -> Any:
    """Text for a text prompt, an assistant's message for a conversation."""
    return sample.text if isinstance(sample.prompt.text, str) else [{"role": "assistant", "content": sample.text}]


def call(reward: Reward, samples: Sequence[Sample]) -> list[float | None]:
    """The function's scores, checked; whatever is wrong names the reward, a prompt and a completion."""
    try:
        values = list(run(reward, samples))
    except Exception as error:
        culprit = next((s for s in samples if raises(reward, s)), samples[0])
        raise RewardError(said(reward, f"raised {type(error).__name__}: {error}", culprit)) from error
    if len(values) != len(samples):
        raise RewardError(said(reward, f"returned {len(values)} scores for {len(samples)} completions", samples[0]))
    return [checked(reward, value, sample) for value, sample in zip(values, samples, strict=True)]


def run(reward: Reward, samples: Sequence[Sample]) -> Any:
    """Calls the function, plain or async, with those arguments that it takes."""
    parameters = inspect.signature(reward.function).parameters.values()
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    wanted = {p.name for p in parameters}
    bound = reward.function.keywords if isinstance(reward.function, partial) else {}  # no column replaces an option
    arguments = {k: v for k, v in reward_arguments(samples).items() if k not in bound and (takes_all or k in wanted)}
    scores = reward.function(**arguments)
    return asyncio.run(awaited(scores)) if inspect.isawaitable(scores) else scores


def raises(reward: Reward, sample: Sample) -> bool:
    """Whether this sample alone makes the function raise."""
    try:
        list(run(reward, [sample]))
    except Exception:  # noqa: BLE001  whatever a user's function may raise
        return True
    return False


async def awaited(scores: Any) -> Any:
    """An awaitable as the coroutine that asyncio.run wants."""
    return await scores


def checked(reward: Reward, value: Any, sample: Sample) -> float | None:
    """A finite number, or None for "could not be scored"."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RewardError(said(reward, f"returned {value!r}, which is no number", sample)) from None
    if not math.isfinite(number):
        raise RewardError(said(reward, f"returned {number}; return None where a sample cannot be scored", sample))
    return number


def said(reward: Reward, what: str, sample: Sample) -> str:
    """An error's text, with an example to try."""
    return f"reward {reward.name!r} {what}\n  prompt: {sample.prompt.text!r}\n  completion: {sample.text!r}"
