"""The share of comparisons that call runs different, on runs whose differences are known."""

from __future__ import annotations

import random

import pytest

from evidence.learning.planted_differences import called_different, examined
from nanorlhf.scripts.comparing.verdicts import Run
from tests.scripts.comparing.test_verdicts import a_run


def some(entry: str, middle: float, count: int = 15) -> list[Run]:
    draw = random.Random(entry)
    return [a_run(entry, seed, draw.gauss(middle, 0.05)) for seed in range(count)]


def test_noise_is_left_alone_and_a_difference_found() -> None:
    runs = [*some("a", 0.9), *some("b", 0.5)]
    found = examined(runs, 200)
    itself, other, both = found["called different"].values()
    assert itself["in any figure"] < 0.1
    assert other["in any figure"] < 0.1
    assert both["in any figure"] > 0.9
    assert "No difference" in found["one pair of each"]["GRPO, itself"][0]
    assert "one is better than other" in found["one pair of each"]["GRPO, a tenth of the learning rate"][0]


def test_no_run_stands_on_both_sides() -> None:
    runs = some("a", 0.9, 6)
    assert called_different(runs, runs, 50)["in any figure"] <= 0.5
    with pytest.raises(ValueError, match="larger"):
        called_different(runs[:5], runs[:5], 1)
