"""Episodes of many turns, played while the engine writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanorlhf.data.row_schemas import Messages
from nanorlhf.data.templates import render
from nanorlhf.engines.base import Completion
from nanorlhf.environments.protocol import Environment
from nanorlhf.types import Sample, Text


class Episodes:
    """Plays episodes: opens them, and after each turn says whether they go on."""

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
        """A new episode; one that cannot begin leaves its sample unscored."""
        sample.own, sample.returned = [], 0.0
        try:
            sample.environment = self.environment()
            sample.environment.reset(**sample.prompt.columns)
        except Exception as error:  # noqa: BLE001  whatever a user's environment may raise
            sample.returned = error

    def goes_on(self, sample: Sample, completion: Completion, turn: str, last: bool) -> bool:
        """Lets the environment answer a turn whose tokens are in the sample; False if the episode is over.

        An environment that raises leaves its sample without a return: unscored, for the fault is not the policy's.
        """
        if not isinstance(sample.returned, float):
            return False
        try:
            observation, earned, done = sample.environment.step(turn)
            sample.returned += float(earned)
            if not done and not isinstance(observation, str):
                raise TypeError(f"step() gave {observation!r} as an observation, and the episode goes on")
        except Exception as error:  # noqa: BLE001  whatever a user's environment may raise
            sample.returned = error
            return False
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
        """An observation's tokens: if the model's message has ended in a chat, a message of the user's."""
        text = observation
        if ended and not isinstance(prompt, str):
            text = self.next_turn(prompt, observation)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def next_turn(self, prompt: Messages, observation: str) -> str:
        """The text that the chat template puts between the end of the model's message and its next one."""
        mark, role = "\u2063mark\u2063", getattr(self.environment, "role", "user")
        messages = [*prompt, {"role": "assistant", "content": mark}, {"role": role, "content": observation}]
        after = render(self.tokenizer, messages, self.template, opens=True).rpartition(mark)[2]
        for end in self.tokenizer.convert_ids_to_tokens(list(self.ends)):
            after = after.removeprefix(str(end))  # which the model wrote itself
        return after
