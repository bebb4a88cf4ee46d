"""An engine that fails: what is started anew, and what ends the run in one line."""

from __future__ import annotations

from typing import Any

import pytest

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

    def close(self) -> None:
        """Nothing to give back."""


class Weights:
    version = 3


def restarting(*engines: Any) -> Restarting:
    left = list(engines)
    return Restarting(lambda: left.pop(0), Weights(), "runs/mine")  # type: ignore[arg-type]


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
