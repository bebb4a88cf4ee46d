"""Passes of a rollout's samples through a model, in rows under a budget of tokens; if memory runs out, smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from nanorlhf.errors import RunError, UsageError
from nanorlhf.learning.packing import beginning, cut, pack, size
from nanorlhf.learning.shares import divided, idle
from nanorlhf.system.device import empty_cache, ran_out
from nanorlhf.system.distributed import world
from nanorlhf.system.random_state import random_state, restore_random
from nanorlhf.system.terminal import EACH, log
from nanorlhf.types import MicroBatch, Rollout

HELP = (
    "lower max_completion_length or lora_r, or give the update more room: gradient_checkpointing true, "
    "offload always, a lower gpu_memory_gib"
)
Rows = Iterable[MicroBatch]


class TooLongError(UsageError):
    """Not even the longest sample passes through the model on its own."""


class Attempt:
    """One try at a pass, used as `with attempt as rows`; it takes an out-of-memory error to itself, unless `one_go`."""

    def __init__(self, phase: str, rows: Callable[[], Rows], one_go: bool = False) -> None:
        self.phase, self.rows, self.one_go, self.full = phase, rows, one_go, False

    def __enter__(self) -> Rows:
        return self.rows()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.full = isinstance(error, RuntimeError) and not isinstance(error, RunError) and ran_out(error)
        if self.full and self.one_go:  # other processes go through the layers with this one
            raise RunError(
                f"out of memory ({self.phase}): with shard_base, say a smaller token_budget; or {HELP}"
            ) from error
        return self.full


class Passes:
    """This process's rows of a rollout, of at most `tokens` each unless a sample is longer.

    With `in_step` the layers are in parts on several processes, which go through them together: each gets as many
    rows, and none can begin again. `undo` drops the gradients of an attempt that ended early.
    """

    def __init__(
        self,
        tokens: int,
        *,
        one_per_row: bool = False,
        at_once: int = 0,
        in_step: bool = False,
        undo: Callable[[], None] = lambda: None,
    ) -> None:
        self.tokens, self.undo = tokens, undo
        self.one_per_row, self.at_once, self.in_step = one_per_row, at_once, in_step
        self.lowered = False

    def attempts(
        self, phase: str, rollout: Rollout, chosen: Tensor, weights: Tensor | None = None, together: int = 1
    ) -> Iterator[Attempt]:
        """Attempts at the samples `chosen (S,)`, until one succeeds; `together` adjacent ones share a row."""
        mine = self.share(rollout, chosen, together)
        weights = torch.zeros(int(rollout.lengths.sum())) if weights is None else weights
        units, common = cut(rollout, mine, 0, together), beginning(rollout, mine)
        longest = max((size(rollout, unit, at_once=self.at_once) for unit in units), default=0)
        whole = longest if self.one_per_row else common + size(rollout, chain(*units), common, self.at_once)

        def rows() -> list[MicroBatch]:
            budget = 0 if self.one_per_row else self.tokens
            packed = list(pack(rollout, mine, weights, budget, together, self.at_once))
            return packed + self.idle(rollout, len(packed))

        return self.retries(phase, longest, whole, rows)

    def retries(
        self, phase: str, longest: int, whole: int, rows: Callable[[], Rows], undo: Callable[[], None] | None = None
    ) -> Iterator[Attempt]:
        """Attempts from the same random numbers, at `whole` tokens, of which `longest` must lie in one row."""
        while True:
            before = random_state()
            attempt = Attempt(phase, rows, self.in_step)
            yield attempt
            if not attempt.full:
                return
            # Only here, outside of the with statement, have the failed call's tensors gone with its frames.
            (undo or self.undo)()
            empty_cache()
            restore_random(before)
            self.lower(phase, longest, whole)

    def share(self, rollout: Rollout, chosen: Tensor, together: int = 1) -> Tensor:
        """(S,) this process's part of the samples `chosen (S,)`."""
        here = world()
        parts = [chosen] if here.size == 1 else divided(rollout, chosen, here.size, together, self.one_per_row)
        return parts[here.rank]

    def idle(self, rollout: Rollout, rows: int) -> list[MicroBatch]:
        """Idle rows, until every process has as many."""
        return [idle(rollout)] * (max(world().gather(rows)) - rows) if self.in_step else []

    def lower(self, phase: str, longest: int, whole: int) -> None:
        """Halves what was tried, but leaves room for the longest."""
        tried = min(self.tokens, whole)
        if tried <= longest:
            raise TooLongError(f"out of memory ({phase}): a row of {longest:,} tokens does not fit on its own; {HELP}")
        self.tokens, self.lowered = max(longest, tried // 2), True
        log.warning(
            f"out of memory ({phase}), nothing is lost: done again with micro-batches of {self.tokens:,} tokens "
            f"instead of {tried:,}, which stay that size",
            extra=EACH,
        )
