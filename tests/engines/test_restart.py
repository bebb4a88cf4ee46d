"""An engine that fails: what is started anew, and what ends the run in one line."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from nanorlhf.engines.base import Completion, Request
from nanorlhf.engines.restart import Restarting
from nanorlhf.errors import RunError
from nanorlhf.types import WeightSync


class Engine:
    """Takes weights unless it is told to fail."""

    def __init__(self, *failures: Exception, sync: WeightSync = "lora") -> None:
        self.failures, self.sync, self.version, self.release = list(failures), sync, -1, "vLLM 0.32.0"

    def update(self, weights: Any) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.version = weights.version

    def generate(
        self, requests: Sequence[Request], seed: int, sampling: Any = None, enough: Any = None
    ) -> Iterator[Completion]:
        yield Completion(requests[0].id, [1], [-1.0], stopped=True)
        if self.failures:
            raise self.failures.pop(0)
        yield from (Completion(r.id, [1], [-1.0], stopped=True) for r in requests[1:])

    def close(self) -> None:
        """Nothing to give back."""


class Weights:
    version = 3


PARTS: list[float] = []  # of the cache, engine by engine
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
ALLOCATED = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def restarting(*engines: Any) -> Restarting:
    left = list(engines)

    def start(part: float) -> Any:
        PARTS.append(part)
        engine = left.pop(0)
        if isinstance(engine, Exception):
            raise engine
        return engine

    PARTS.clear()
    return Restarting(start, Weights(), "runs/mine")  # type: ignore[arg-type]


def test_weights_that_an_engine_has_never_taken_are_told_with_other_ways() -> None:
    engine = restarting(Engine(IndexError("tuple index out of range")))
    with pytest.raises(RunError) as said:
        engine.update(Weights())  # type: ignore[arg-type]
    assert str(said.value) == (
        "vLLM 0.32.0 (weight_sync lora) does not take the weights (IndexError: tuple index out of range); "
        "use weight_sync merged, engine hf or another version of vLLM"
    )


def test_one_that_has_is_started_anew() -> None:
    first, second = Engine(sync="merged"), Engine(sync="merged")
    engine = restarting(first, second)
    engine.update(Weights())  # type: ignore[arg-type]
    first.failures.append(RuntimeError("an illegal memory access"))
    engine.update(Weights())  # type: ignore[arg-type]
    assert engine.engine is second and engine.version == second.version == 3
    assert "weight_sync lora (with an adapter)" in engine.instead


def test_one_that_failed_is_garbage_although_a_run_does_not_look_at_it() -> None:
    first = Engine(RuntimeError("an illegal memory access"))
    first.own = first  # type: ignore[attr-defined]  # so only a collection finds it
    ref = weakref.ref(first)
    engine = restarting(first, Engine())
    gc.freeze()  # as a run does before its first step
    assert len(list(engine.generate([Request(i, [1, 2]) for i in range(2)], 0))) == 2
    del first
    gc.collect()
    assert ref() is None


def test_memory_that_runs_out_at_the_start_halves_the_cache_once(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine()
    assert restarting(FULL, engine).engine is engine
    assert PARTS == [1.0, 0.5]
    assert "once more with half the cache" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"with half its cache, too \(OutOfMemoryError: CUDA out of .* lower gpu_memory"):
        restarting(ALLOCATED, FULL, engine)
    assert PARTS == [1.0, 0.5]
    with pytest.raises(ValueError, match="no such model"):
        restarting(ValueError("no such model"), engine)
    assert PARTS == [1.0], "another mistake is none that a smaller cache mends"


def test_memory_that_runs_out_while_decoding_halves_the_cache_once_in_a_run(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Engine(), Engine()
    engine = restarting(first, second)
    engine.update(Weights())  # type: ignore[arg-type]
    first.failures.append(FULL)
    asked = [Request(i, [1, 2]) for i in range(4)]
    assert [c.id for c in engine.generate(asked, 0)] == [0, 1, 2, 3]
    assert PARTS == [1.0, 0.5] and engine.version == 3
    assert "with half its cache, and writes the same" in caplog.text
    second.failures.append(ALLOCATED)  # many steps later
    with pytest.raises(RunError, match=r"with half its cache, too .* lower gpu_memory_gib"):
        list(engine.generate(asked, 1))


def test_another_failure_keeps_the_whole_cache(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Engine(RuntimeError("an illegal memory access")), Engine()
    engine = restarting(first, second)
    assert len(list(engine.generate([Request(i, [1, 2]) for i in range(2)], 0))) == 2
    assert PARTS == [1.0, 1.0]
    assert "started anew, and writes the same" in caplog.text


def test_it_fails_once_with_the_same_weights() -> None:
    engines = [Engine(), Engine(), Engine()]
    engine, weights, asked = restarting(*engines), Weights(), [Request(i, [1, 2]) for i in range(2)]
    for version, broken in ((1, engines[0]), (2, engines[1])):
        weights.version = version
        engine.weights = weights  # type: ignore[assignment]
        engine.update(weights)  # type: ignore[arg-type]
        broken.failures.append(RuntimeError("an illegal memory access"))
        assert len(list(engine.generate(asked, 0))) == 2
    engines[2].failures.append(RuntimeError("an illegal memory access"))
    with pytest.raises(RunError, match="failed again after it was started anew"):
        list(engine.generate(asked, 0))
    assert PARTS == [1.0] * 3


def test_memory_that_runs_out_over_the_first_weights_halves_the_cache_too() -> None:
    second = Engine()
    engine = restarting(Engine(FULL), second)
    engine.update(Weights())  # type: ignore[arg-type]
    assert PARTS == [1.0, 0.5]
    assert engine.engine is second and engine.version == 3


def test_memory_that_runs_out_as_it_wakes_is_said_in_a_line() -> None:
    class Asleep(Engine):
        def wake(self) -> None:
            raise self.failures.pop(0)

    with pytest.raises(RunError, match=r"no room on the card for the engine to wake .*--resume runs/mine"):
        restarting(Asleep(FULL)).wake()
    with pytest.raises(ValueError, match="another"):
        restarting(Asleep(ValueError("another"))).wake()
