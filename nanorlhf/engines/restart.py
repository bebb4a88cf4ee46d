"""An engine that failed is started again, once with the same weights, and writes the same anew."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch

from nanorlhf.engines.base import Completion, Engine, Enough, Request, Sampling, Weights, never
from nanorlhf.engines.side_effects import kept_random_state
from nanorlhf.errors import RunError, UsageError, error_line
from nanorlhf.records.pace import Pace
from nanorlhf.system.device import empty_cache, ran_out
from nanorlhf.system.distributed import world
from nanorlhf.system.terminal import log
from nanorlhf.types import WeightSync

SMALLER = 0.5  # of the cache, after memory ran out
HELP = "lower gpu_memory_gib, so that more is kept free, or max_completion_length, or set offload always"


class Restarting:
    """An engine for the whole run, whatever becomes of the one inside; a mistake of the user's is no failure of it.

    `start` makes one with a part of the cache: all of it, and after memory ran out half of it.
    """

    def __init__(self, start: Callable[[float], Engine], weights: Weights, resume: str) -> None:
        self.start, self.weights, self.resume = start, weights, resume
        self.part = 1.0
        self.engine = self.first()
        self.version = self.engine.version
        self.failed: int | None = None  # which weights it served when it failed last

    def first(self) -> Engine:
        """The engine; if memory runs out as it starts, with half the cache."""
        while True:
            try:
                return self.start(self.part)
            except Exception as error:
                if not ran_out(error):
                    raise
                failure = error_line(error)
            self.shrink(failure)  # here nothing refers to what failed
            give_back()
            log.warning(f"the engine ran out of memory as it started ({failure}); once more with half the cache")

    def shrink(self, failure: str) -> None:
        """Half the cache from now on; if it is halved already, the end."""
        if self.part < 1:
            raise RunError(f"the engine ran out of memory with half its cache, too ({failure}); {HELP}")
        if world().size > 1:  # engines start together
            raise RunError(f"the engine ran out of memory ({failure}); {HELP}")
        self.part = SMALLER

    @property
    def name(self) -> str:
        return type(self.engine).__name__

    @property
    def sync(self) -> WeightSync:
        return self.engine.sync

    @property
    def release(self) -> str:
        return self.engine.release

    @property
    def described(self) -> str:
        """The engine, and how it gets its weights."""
        return f"{self.release} (weight_sync {self.sync})"

    @property
    def instead(self) -> str:
        """Options to try if it does not do what it should."""
        ways = {"lora": "weight_sync merged", "merged": "weight_sync lora (with an adapter)"}
        others = "engine hf or another version of vLLM" if "vLLM" in self.release else "engine vllm"
        return f"{ways[self.sync]}, {others}"

    @property
    def go_on(self) -> str:
        """The way on after a failure that ends the run."""
        return f"go on from the last checkpoint with --resume {self.resume}"

    @property
    def pace(self) -> Pace:
        return self.engine.pace

    def generate(
        self, requests: Sequence[Request], seed: int, sampling: Sampling | None = None, enough: Enough = never
    ) -> Iterator[Completion]:
        """Completions as they finish; after a failure those that were still wanted, which the seed makes the same."""
        given = set[int]()
        while len(given) < len(requests):
            try:
                for completion in self.engine.generate(requests, seed, sampling, enough):
                    if completion.id not in given:
                        given.add(completion.id)
                        yield completion
            except (UsageError, RunError):
                raise
            except Exception as error:  # noqa: BLE001  an engine may fail in any way
                failure, full = error_line(error), ran_out(error)
            else:
                return
            self.restart(failure, full)  # here nothing refers to what failed

    def forget(self) -> None:
        self.engine.forget()

    def update(self, weights: Weights) -> None:
        """Serves these weights from now on, by a new engine if the old one cannot."""
        try:
            self.engine.update(weights)
        except (UsageError, RunError):
            raise
        except Exception as error:
            failure, full = error_line(error), ran_out(error)
            if self.version == -1 and not full:  # it has never taken any
                raise RunError(f"{self.described} does not take the weights ({failure}); use {self.instead}") from error
        else:
            self.version = self.engine.version
            return
        self.restart(failure, full)

    def restart(self, failure: str, full: bool) -> None:
        """A new engine with the policy's weights; a second failure with the same weights ends the run."""
        if full:
            self.shrink(failure)
        if self.failed == self.version:
            raise RunError(f"the engine failed again after it was started anew ({failure}); {self.go_on}")
        if world().size > 1:  # engines start together
            raise RunError(f"the engine failed ({failure}); {self.go_on}")
        self.failed = self.version
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        gc.unfreeze()  # collections during a run do not look at what was there before, as this engine was
        with suppress(Exception):  # it is broken
            self.engine.close()
        if full:
            give_back()
        try:
            with kept_random_state(devices):
                self.engine = self.start(self.part)
                self.engine.update(self.weights)
        except Exception as error:
            raise RunError(
                f"the engine failed ({failure}) and could not be started anew ({error_line(error)}); {self.go_on}"
            ) from error
        self.version = self.engine.version
        how = "started anew" if self.part == 1 else "started anew with half its cache"
        log.warning(f"the engine failed ({failure}); it was {how}, and writes the same")

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        try:
            self.engine.wake()
        except Exception as error:
            if not ran_out(error):
                raise
            raise RunError(
                f"no room on the card for the engine to wake ({error_line(error)}); {HELP}; {self.go_on}"
            ) from error

    def close(self) -> None:
        self.engine.close()


def give_back() -> None:
    """Gives the card what an engine that has gone still holds."""
    if "vllm" in sys.modules:
        with suppress(Exception):  # these are internals of torch's and vLLM's
            from nanorlhf.engines.vllm_leftovers import forget

            forget()
    empty_cache()
