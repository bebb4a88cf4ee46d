"""How many tokens pass through the model at once: fewer, once memory has run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from nanorlhf.errors import RunError, UsageError
from nanorlhf.system import random_state
from nanorlhf.system.device import empty_cache, ran_out

R = TypeVar("R")
TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}  # in a micro-batch, where token_budget is auto

R = TypeVar("R")
HELP = (
    "lower max_completion_length or lora_r, or give the update more room: gradient_checkpointing true, "
    "offload always, a lower gpu_memory_gib"
)


class TooLongError(UsageError):
    """Not even the longest sample passes through the model on its own."""


class Budget:
    """Tokens in a micro-batch; what was done about full memory is kept in `remarks` until somebody says it."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.lowered = False
        self.remarks: list[str] = []

    def fit(self, phase: str, lengths: Sequence[int], work: Callable[[], R], clear: Callable[[], None]) -> R:
        """What `work` returns; where memory runs out it begins again, from the same random numbers, with less at once.

        `lengths` are those of what may not be cut: samples, or pairs that share a row. `clear` drops what was begun.
        """
        while True:
            before = random_state.random_state()
            try:
                return work()
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            # Only here, outside of the handler, have the failed call's tensors gone with its frames.
            clear()
            empty_cache()
            random_state.restore_random(before)
            self.lower(phase, lengths)

    def lower(self, phase: str, lengths: Sequence[int]) -> None:
        """Half of what was tried at most, but room for the longest."""
        longest, tried = max(lengths), min(self.tokens, sum(lengths))
        if tried <= longest:
            raise TooLongError(f"out of memory ({phase}): a row of {longest:,} tokens does not fit on its own; {HELP}")
        self.tokens = max(longest, tried // 2)
        self.lowered = True
        self.remarks.append(
            f"out of memory ({phase}), nothing is lost: done again with micro-batches of {self.tokens:,} tokens "
            f"instead of {tried:,}, which stay that size"
        )

    def told(self) -> list[str]:
        """The remarks, which are not kept any longer."""
        remarks, self.remarks = self.remarks, []
        return remarks


def in_one_go(phase: str, work: Callable[[], R]) -> R:
    """What `work` returns, where other processes go through the layers with this one and it cannot begin again."""
    try:
        return work()
    except RuntimeError as error:
        if ran_out(error):
            raise RunError(
                f"out of memory ({phase}): with shard_base, say a smaller token_budget; or {HELP}"
            ) from error
        raise
