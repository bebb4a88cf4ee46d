"""Tasks of Reasoning Gym (arXiv:2505.24760) as datasets: `reasoning_gym:TASK`, made when they are asked for."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from zlib import crc32

import yaml

from nanorlhf.errors import UsageError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

OURS = {"size": 2000, "test_size": 256, "seed": 0}  # rows to train on, rows held out, and where the draws begin
SHARE = 5  # every fifth question is held out
TRIES = 4  # draws for a row, beyond those that go to the other split, before a task counts as used up


def reasoning_gym_dataset(name: str, config: str | None, split: str) -> Dataset:
    """Columns `prompt` (chat messages), `entry` (for the reward `reasoning`), `answer`, and `completion` to copy.

    `config` holds options as YAML: ours, and those of the task itself. No question comes twice, and a checksum of its
    words puts it into one split for good, whatever the seed.
    """
    from datasets import Dataset  # takes a second to import, and most commands never need it

    options = read_options(name, config)
    if split not in ("train", "test"):
        raise UsageError(f"reasoning_gym:{name} has no split {split!r}: choose 'train' or 'test'")
    size, test_size, seed = (options.pop(ours) for ours in OURS)
    entries = distinct(name, options, seed, size if split == "train" else test_size, split == "test")
    rows = [as_row(name, options, entry) for entry in entries]
    if any(row["answer"] is None for row in rows):  # such tasks have many right answers and give none
        rows = [{column: row[column] for column in ("prompt", "entry")} for row in rows]
    return Dataset.from_list(rows)


def read_options(name: str, config: str | None) -> dict[str, Any]:
    """Reads and checks the configuration's options: ours have defaults, the task's own are there only if given."""
    try:
        given = yaml.safe_load(config or "{}")
    except yaml.YAMLError as error:
        raise UsageError(f"dataset_config={config!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise UsageError(f"dataset_config={config!r} must be options: '{{size: 5000}}'")
    known = {field.name for field in dataclasses.fields(registered(name)[1])} | OURS.keys()
    for option, value in given.items():
        if option not in known:
            near = nearest(str(option), known)
            raise UsageError(f"dataset_config: reasoning_gym:{name} has no option {option!r}; {near}")
        if option in OURS and (type(value) is not int or value < (option != "seed")):
            raise UsageError(f"dataset_config: {option}={value!r} must be a whole number, above 0 where it is a size")
    return OURS | given


def distinct(name: str, options: Mapping[str, Any], seed: int, size: int, held_out: bool) -> list[dict[str, Any]]:
    """So many different questions of one split, or all that a small task has."""
    draws = size * TRIES * (SHARE if held_out else 1)
    source = made(name, {**options, "size": draws, "seed": seed})
    found: dict[str, dict[str, Any]] = {}
    for index in range(draws):
        entry = source[index]
        question = entry["question"]
        if (crc32(question.encode()) % SHARE == 0) == held_out:
            found.setdefault(question, entry)
            if len(found) == size:
                break
    if not found:
        raise UsageError(f"reasoning_gym:{name} has no question for this split with {dict(options)}")
    return list(found.values())


def as_row(name: str, options: Mapping[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as a row; if it is the task's own, its scorer will have these options again."""
    answer = None if entry["answer"] is None else str(entry["answer"])
    whole = {**entry, "options": options} if entry["metadata"].get("source_dataset") == name else entry
    return {
        "prompt": [{"role": "user", "content": entry["question"]}],
        "answer": answer,
        "entry": json.dumps(whole, default=str),
        "completion": [{"role": "assistant", "content": f"<answer>{answer}</answer>"}],
    }


def registry() -> dict[str, tuple[type, type]]:
    """Every task's class and that of its options; the package's libraries warn of their own syntax when compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from reasoning_gym.factory import DATASETS
    return DATASETS


def registered(name: str) -> tuple[type, type]:
    """A task's class and that of its options."""
    try:
        known = registry()
    except ImportError as error:
        raise UsageError(f"reasoning_gym:{name} needs its package: pip install reasoning-gym") from error
    if name not in known:
        raise UsageError(f"reasoning_gym has no task {name!r}; {nearest(name, known)}")
    return known[name]


def made(name: str, options: Mapping[str, Any]) -> Any:
    """The task with these options, which it checks itself."""
    registered(name)
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import create_dataset

    plain = dict(options)
    if name == "composite":
        plain["datasets"] = [DatasetSpec(**{"weight": 1.0, "config": {}} | one) for one in plain.get("datasets") or []]
    try:
        return create_dataset(name, **plain)
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise UsageError(f"dataset_config: reasoning_gym:{name} refuses {dict(options)}: {error}") from error


@lru_cache(maxsize=256)
def scorer(name: str, options: str = "{}") -> Callable[..., float]:
    """The task's own judge, which takes `answer` and `entry`; `options` are JSON."""
    return made(name, json.loads(options)).score_answer
