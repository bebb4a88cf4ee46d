"""Lengths asked for, and how far from them a completion is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.errors import UsageError
from nanorlhf.rewards.length import check, length

NOTHING: dict[str, Any] = {"target": None, "min": None, "max": None, "slack": 100}


def of(*tokens: int, **options: Any) -> list[float]:
    return length([[7] * n for n in tokens], **options, completions=["?"] * len(tokens))


@pytest.mark.parametrize(
    ("options", "rewards"),
    [
        ({"min": 20, "max": 30, "slack": 10}, {0: -1, 5: -1, 10: -1, 15: -0.5, 20: 0, 30: 0, 31: -0.1, 40: -1, 99: -1}),
        ({"max": 30, "slack": 10}, {0: 0, 30: 0, 35: -0.5, 400: -1}),
        ({"max": 0, "slack": 10}, {0: 0, 1: -0.1}),
        ({"min": 20, "slack": 10}, {0: -1, 15: -0.5, 20: 0, 10_000: 0}),
        ({"target": 20, "slack": 10}, {0: -1, 19: -0.1, 20: 0, 21: -0.1, 30: -1}),
        ({"target": 200}, {150: -0.5, 200: 0, 250: -0.5}),
    ],
)
def test_table(options: dict[str, Any], rewards: dict[int, float]) -> None:
    check(**NOTHING | options)
    assert of(*rewards, **options) == pytest.approx(list(rewards.values()))


@given(st.integers(0, 500), st.integers(0, 200), st.integers(0, 200), st.integers(1, 300))
def test_one_token_never_changes_more_than_its_share(tokens: int, low: int, width: int, slack: int) -> None:
    here, beyond = of(tokens, tokens + 1, min=low, max=low + width, slack=slack)
    assert -1 <= here <= 0 and abs(here - beyond) <= 1 / slack + 1e-12
    assert (here == 0) == (low <= tokens <= low + width)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "needs a target, a min or a max"),
        ({"target": 5, "max": 9}, "a target or min and max"),
        ({"min": 9, "max": 5}, "min=9 is above its max=5"),
        ({"max": -1}, "max=-1"),
        ({"max": 2.5}, "max=2.5"),
        ({"max": 5, "slack": 0}, "slack=0"),
    ],
)
def test_options_are_checked_as_they_are_read(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        check(**NOTHING | options)
