"""Random input of every kind, some hundred examples of each."""

from __future__ import annotations

import time

import pytest

from evidence.survival import fuzz
from nanorlhf.errors import UsageError


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_nothing_reaches_the_user_but_a_line(name: str) -> None:
    fuzz.run(fuzz.TARGETS[name], 300)


def test_what_it_would_find() -> None:
    with pytest.raises(KeyError), fuzz.watched():
        raise KeyError("x")
    with pytest.raises(AssertionError, match="an empty complaint"), fuzz.watched():
        raise UsageError
    with fuzz.watched():
        raise UsageError("it says why")


def test_what_hangs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "LONGEST", 0.05)
    with pytest.raises(TimeoutError, match="still going on"), fuzz.watched():
        time.sleep(30)
