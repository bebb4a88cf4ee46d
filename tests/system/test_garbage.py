"""Garbage collection during a run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanorlhf.grpo import GRPOTrainer
from nanorlhf.system.garbage import settled
from tests.test_trainer import config


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """As a user's process is; tests' own objects are left out again afterwards."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_a_run_does_so_until_it_ends(tmp_path: Path) -> None:
    steps = GRPOTrainer(args=config(tmp_path / "run")).steps()
    next(steps)
    assert gc.get_freeze_count() > 0
    steps.close()
    assert gc.get_freeze_count() == 0


def gone(ring: weakref.ref[Ring]) -> bool:
    gc.collect()
    return ring() is None


def test_what_was_there_before_is_looked_at_again_afterwards() -> None:
    stays = Ring()
    ref = weakref.ref(stays)
    with settled():
        assert gc.get_freeze_count() > 10_000
        del stays
        assert not gone(ref)
        new = weakref.ref(Ring())
        assert gone(new), "what a run makes is collected"
    assert gc.get_freeze_count() == 0
    assert gone(ref)


def test_garbage_of_before_does_not_stay() -> None:
    ref = weakref.ref(Ring())
    with settled():
        assert ref() is None


def test_a_caller_who_does_so_already_is_left_alone() -> None:
    gc.freeze()
    with settled():
        pass
    assert gc.get_freeze_count() > 0
