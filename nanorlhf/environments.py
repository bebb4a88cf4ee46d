"""Episodes of many turns: the policy writes, the environment answers, and what it answers is context, never trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, cast

import datasets
from transformers import PreTrainedTokenizerBase

from nanorlhf.calculator import Calculator
from nanorlhf.chat import render
from nanorlhf.engines.base import Completion
from nanorlhf.errors import UsageError, nearest
from nanorlhf.guessing import Guessing
from nanorlhf.options import TrainConfig
from nanorlhf.plugins import from_file, is_file_spec
from nanorlhf.rows import Messages
from nanorlhf.types import Sample, Text


class Environment(Protocol):
    """One episode's other side; a class whose objects are made anew for every episode.

    More may be there: `stop`, strings that end a turn in the middle of the model's message, which goes on after the
    observation; `role`, whose message an observation is, where the model's has ended (user); and `rows(split)`, for
    environments that bring their own questions.
    """

    def reset(self, **columns: Any) -> str | None:
        """Begins an episode from a dataset row; says what the model is asked, where the row has no prompt."""
        ...

    def step(self, completion: str) -> tuple[str, float, bool]:
        """What the model is told after its turn, what the turn earned, and whether the episode is over."""
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
    return tuple(getattr(environment, "stop", ()))


def own_questions(
    environment: type[Environment], config: TrainConfig
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The rows that an environment brings, to train on and to evaluate on, with what it asks as their prompts."""
    if not hasattr(environment, "rows"):
        raise UsageError(f"environment {environment.__name__} has no questions of its own (rows): say dataset_name")

    def asked(split: str) -> datasets.Dataset:
        rows = cast(Any, environment).rows(split)
        prompts = [[{"role": "user", "content": environment().reset(**row)}] for row in rows]
        columns = [row | {config.prompt_column: prompt} for row, prompt in zip(rows, prompts, strict=True)]
        return datasets.Dataset.from_list(columns)

    test = config.dataset_test_split
    return asked(config.dataset_train_split), asked(test) if test else None


class Stage:
    """Where episodes are played: opens them, and after each turn says whether they go on."""

    def __init__(
        self,
        environment: type[Environment],
        tokenizer: PreTrainedTokenizerBase,
        ends: tuple[int, ...],
        limit: int,
        template: Mapping[str, Any],
    ) -> None:
        self.environment, self.tokenizer, self.ends = environment, tokenizer, ends
        self.limit, self.template = limit, template

    def open(self, sample: Sample) -> None:
        """A new episode."""
        sample.environment, sample.own, sample.returned = self.environment(), [], 0.0
        sample.environment.reset(**sample.prompt.columns)

    def goes_on(self, sample: Sample, completion: Completion, turn: str, last: bool) -> bool:
        """Lets the environment answer a turn whose tokens are in the sample; False where the episode is over.

        An environment that raises leaves its sample without a return: unscored, for the fault is not the policy's.
        """
        try:
            observation, earned, done = sample.environment.step(turn)
        except Exception as error:  # noqa: BLE001  whatever a user's environment may raise
            sample.returned = error
            return False
        assert isinstance(sample.returned, float)
        sample.returned += earned
        if done or not completion.stopped:
            return False
        ids = self.observed(sample.prompt.text, observation, completion.token_ids[-1] in self.ends)
        if last or len(sample.completion_ids) + len(ids) >= self.limit:
            sample.stopped = False  # cut off
            return False
        assert sample.own is not None
        sample.completion_ids += ids
        sample.own += [False] * len(ids)
        return True

    def observed(self, prompt: Text, observation: str, ended: bool) -> list[int]:
        """An observation's tokens: where the model's message has ended in a chat, a message of the user's."""
        text = observation
        if ended and not isinstance(prompt, str):
            text = self.next_turn(prompt, observation)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def next_turn(self, prompt: Messages, observation: str) -> str:
        """What the chat template puts between the end of the model's message and its next one."""
        mark, role = "\u2063mark\u2063", getattr(self.environment, "role", "user")
        messages = [*prompt, {"role": "assistant", "content": mark}, {"role": role, "content": observation}]
        after = render(self.tokenizer, messages, self.template, opens=True).rpartition(mark)[2]
        for end in self.tokenizer.convert_ids_to_tokens(list(self.ends)):
            after = after.removeprefix(str(end))  # which the model wrote itself
        return after


def environment(environment_returns: list[float | Exception]) -> list[float | Exception]:
    """The reward that environments give: what an episode's turns earned."""
    return environment_returns


environment.in_trainer = True  # type: ignore[attr-defined]  its numbers are there already
