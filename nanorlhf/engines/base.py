"""The interface of an engine, and that of the policy to an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanorlhf.records.pace import Pace
from nanorlhf.types import WeightSync

MISMATCH_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # nats a token; more, and the engine is not the policy

SHORTER = 4  # completions that are expected where one of full length has room
Enough = Callable[[], bool]


def never() -> bool:
    """Waits for every request to its end."""
    return False


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to write; `id` comes back with it."""

    id: int
    prompt_ids: list[int]
    greedy: bool = False
    max_tokens: int | None = None  # if it may have fewer than the sampling says
    begun: Sequence[int] = ()  # the end of an answer that this goes on with: a stop string may begin in it


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion as an engine wrote it: ids with the end token, and the log-probability of each as it was sampled."""

    id: int
    token_ids: list[int]
    logprobs: list[float]
    stopped: bool  # False: cut off at the length limit
    ended: bool = True  # False: it was still being written when there was enough


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings by which every request of a run is sampled."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()

    def limit(self, request: Request) -> int:
        """Tokens that this request may come to."""
        return self.max_new_tokens if request.max_tokens is None else min(self.max_new_tokens, request.max_tokens)


@dataclass(frozen=True, slots=True)
class CacheBudget:
    """The key-value cache that an engine may have on a card, and whether it leaves the card at times."""

    bytes: int
    sequence: int  # bytes of one completion of full length
    sleeps: bool
    requests: int  # completions that are asked for at once, as far as the engine takes them

    @property
    def sequences(self) -> int:
        """Completions of full length that it holds."""
        return self.bytes // self.sequence if self.sequence else 0

    @property
    def at_once(self) -> int:
        """Completions that may decode at once: most are shorter, and one that has no room left begins again."""
        return min(self.requests, SHORTER * self.sequences)

    def part(self, share: float) -> CacheBudget:
        """Less of it, but enough for one completion."""
        return replace(self, bytes=max(int(self.bytes * share), self.sequence))


class Weights(Protocol):
    """The policy as an engine sees it: read-only, in memory."""

    version: int

    def adapter(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's adapter config as a dict, and its tensors by PEFT's names (as `get_peft_model_state_dict` gives)."""
        ...

    def merged(self, everything: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the plain model by its Hugging Face name, adapters merged; or what learning changes."""
        ...

    def saved(self, everything: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The same as a checkpoint has them, which is what vLLM reads."""
        ...

    def serving_copy(self, sync: WeightSync) -> nn.Module:
        """A second model to generate with: the plain one for `merged`, one with the adapter for `lora`."""
        ...


class Engine(Protocol):
    """Writes completions; lives as long as the run."""

    version: int  # of the weights it serves; -1 before the first update

    @property
    def pace(self) -> Pace:
        """The sequences that decoded together, step by step."""
        ...

    @property
    def sync(self) -> WeightSync:
        """The way in which weights reach it."""
        ...

    @property
    def release(self) -> str:
        """The library that it is, with its version."""
        ...

    def generate(
        self, requests: Sequence[Request], seed: int, sampling: Sampling | None = None, enough: Enough = never
    ) -> Iterator[Completion]:
        """Completions in the order in which they finish; the same requests and seed give the same tokens.

        Once there is `enough`, which is asked after each step in which some finished, the others come as far as they
        are, even if nothing was written of them yet.
        """
        ...

    def forget(self) -> None:
        """Drop what is kept of earlier prompts, so that what is written next depends on nothing before it."""
        ...

    def update(self, weights: Weights) -> None:
        """Serve these weights from now on."""
        ...

    def sleep(self) -> None:
        """Leave the GPU to others."""
        ...

    def wake(self) -> None:
        """Come back; the next `update` makes it fresh."""
        ...

    def close(self) -> None:
        """End it and give everything back."""
        ...


def refresh(engine: Engine, weights: Weights) -> None:
    """Gives an engine these weights, unless it serves them already."""
    if engine.version != weights.version:
        engine.update(weights)
