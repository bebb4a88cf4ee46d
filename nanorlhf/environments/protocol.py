"""Episodes of many turns: the policy writes, the environment answers, and what it answers is context, never trained."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, cast

import datasets

from nanorlhf.config.option import strings
from nanorlhf.config.training import TrainConfig
from nanorlhf.data.sources import part
from nanorlhf.errors import UsageError, first_line, nearest
from nanorlhf.system.user_code import from_file, is_file_spec
from nanorlhf.tasks.calculator import Calculator
from nanorlhf.tasks.guessing import Guessing


class Environment(Protocol):
    """One episode's other side; a class whose objects are made anew for every episode.

    More may be there: `stop`, strings that end a turn in the middle of the model's message, which goes on after the
    observation; `role`, whose message an observation is, if the model's has ended (user); and `rows(split)`, for
    environments that bring their own questions.
    """

    def reset(self, **columns: Any) -> str | None:
        """Begins an episode from a dataset row; says what the model is asked, if the row has no prompt."""
        ...

    def step(self, completion: str) -> tuple[str, float, bool]:
        """Gives what the model is told after its turn, what the turn earned, and whether the episode is over."""
        ...


BUILT_IN: dict[str, type[Environment]] = {"calculator": Calculator, "guessing": Guessing}


def find_environment(spec: str) -> type[Environment]:
    """A ready environment by its name, or a class by `path/to/file.py:Class`."""
    if not is_file_spec(spec) and spec not in BUILT_IN:
        raise UsageError(f"unknown environment {spec!r}: {nearest(spec, BUILT_IN)}, or path/to/file.py:Class")
    found = from_file(spec) if is_file_spec(spec) else BUILT_IN[spec]
    if not (inspect.isclass(found) and all(callable(getattr(found, name, None)) for name in ("reset", "step"))):
        raise UsageError(f"environment={spec!r} must be a class with reset(**columns) and step(completion)")
    return cast(type[Environment], found)


def stops(environment: type[Environment] | None) -> tuple[str, ...]:
    """Strings that end a turn."""
    return strings(getattr(environment, "stop", ()))


def own_questions(
    environment: type[Environment], config: TrainConfig, evaluates: bool = True
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The rows that an environment brings, to train on and to evaluate on, with what it asks as their prompts."""
    if not hasattr(environment, "rows"):
        raise UsageError(f"environment {environment.__name__} has no questions of its own (rows): say dataset_name")

    column = config.columns.get("prompt", "prompt")

    def asked(split: str) -> datasets.Dataset:
        try:
            rows = list(cast(Any, environment).rows(split.partition("[")[0]))
            prompts = [[{"role": "user", "content": environment().reset(**row)}] for row in rows]
            made = datasets.Dataset.from_list([row | {column: p} for row, p in zip(rows, prompts, strict=True)])
            return cast(datasets.Dataset, part(made, split))
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"environment {environment.__name__} gives no questions for {split!r}: {why}") from error

    test = config.dataset_test_split if evaluates and not config.dataset_test_name else None
    return asked(config.dataset_train_split), asked(test) if test else None


def environment(environment_returns: list[float | Exception]) -> list[float | Exception]:
    """The reward that environments give: what an episode's turns earned."""
    return environment_returns


environment.in_trainer = True  # type: ignore[attr-defined]  its numbers are there already
