"""Formulas of evaluation, by numbers worked out by hand or counted."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean

import pytest

from nanorlhf.scripts.statistics import differ, estimate, holm, majority_at, pass_at, shows_from, welch, z_score


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(k: int, right: int) -> None:
    passed = [True] * right + [False] * (6 - right)
    counted = [any(chosen) for chosen in combinations(passed, k)]
    assert pass_at(k, passed) == pytest.approx(fmean(map(float, counted)))


def test_majority() -> None:
    answers, passed = ["7", "8", "7", "9", None], [True, False, True, False, False]
    assert majority_at(5, answers, passed) == 1
    assert majority_at(2, answers, passed) == 0.5, "a tie"
    assert majority_at(1, ["8", *answers], [False, *passed]) == 0
    assert majority_at(3, [None, None, None], [False] * 3) == 0
    assert majority_at(4, [None, None, "7", "8"], [False, False, True, False]) == 0.5


def test_wilsons_interval() -> None:
    got = estimate([1.0] * 8 + [0.0] * 2)  # Wilson's published form for 8 of 10: .4902 to .9433
    assert (round(got.low, 4), round(got.mean, 4), round(got.high, 4)) == (0.4902, 0.8, 0.9433)
    none = estimate([0.0] * 10)
    assert (round(none.low, 12), round(none.high, 4)) == (0, 0.2775)


def test_the_normal_interval() -> None:
    got = estimate([0.0, 0.5, 1.0, 0.5])
    margin = 1.959964 * math.sqrt(1 / 6) / 2
    assert (got.mean, got.low, got.high) == pytest.approx((0.5, 0.5 - margin, 0.5 + margin), abs=1e-6)
    assert estimate([0.5]).high == 1
    assert estimate([2.0]).high == math.inf


def test_two_shares() -> None:
    def shares(right: int, wrong: int) -> list[bool]:
        return [True] * right + [False] * wrong

    assert differ(shares(50, 50), shares(50, 50)) == 1
    assert differ(shares(60, 40), shares(45, 55)) == pytest.approx(0.0337, abs=1e-4)  # z = 2.1240
    assert differ(shares(5, 0), shares(5, 0)) == 1


def test_standard_errors_between_two_shares() -> None:
    assert z_score(0.5, 0.6, 512) == pytest.approx(3.216, abs=1e-3)
    assert z_score(0.6, 0.5, 512) == pytest.approx(-3.216, abs=1e-3)
    assert z_score(0.0, 0.0, 512) == z_score(1.0, 1.0, 512) == 0


def test_welchs_test() -> None:
    # Equal variances of 1 and three values each: t = 3 / sqrt(2/3), and Student's distribution of 4 degrees of freedom
    # is 1/2 + 3/8 t / r (1 - t^2 / (12 r^2)) with r^2 = 1 + t^2 / 4.
    t, r = 3 / math.sqrt(2 / 3), math.sqrt(1 + 13.5 / 4)
    exact = 2 * (1 - (0.5 + 3 / 8 * t / r * (1 - 13.5 / (12 * r**2))))
    assert welch([1, 2, 3], [4, 5, 6]) == pytest.approx(exact, rel=1e-9)
    assert exact == pytest.approx(0.0213, abs=1e-4)
    # Unequal spreads: t = 2 / sqrt(2/3 + 1/3), of 1 / (4/9 / 1 + 1/9 / 2) = 2 degrees, and 1/2 + t / (2 sqrt(2 + t^2)).
    root = math.sqrt(2 / 3)
    assert welch([-root, root], [1, 2, 3]) == pytest.approx(1 - 2 / math.sqrt(6))
    assert welch([1, 2, 3], [1, 2, 3]) == pytest.approx(1)
    with pytest.raises(ValueError, match="single value"):
        welch([1.0], [1.0, 2.0])


def test_without_any_spread_a_difference_cannot_be_tested() -> None:
    assert welch([1, 1, 1], [0.9, 0.9, 0.9]) is None and welch([1, 1], [1, 1]) == 1
    assert welch([1, 1, 1 - 1e-16], [0.9, 0.9, 0.9 + 1e-16]) is None, "rounding is no spread"
    assert welch([0.9, 0.9], [0.9 + 1e-16, 0.9]) == 1 and welch([0, 0], [0, 0]) == 1
    # One that does not vary is a constant: t = .9 / (.1 / sqrt 3), and with 2 degrees of freedom 1 - t / sqrt(2 + t^2).
    t = 0.9 / (0.1 / math.sqrt(3))
    for one, other in (([1, 1, 1], [0, 0.1, 0.2]), ([0, 0.1, 0.2], [1, 1, 1])):
        assert welch(one, other) == pytest.approx(1 - t / math.sqrt(2 + t**2), rel=1e-9)


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_from_where_a_difference_shows() -> None:
    far = shows_from(3, 1)  # two-sided t of 4 degrees of freedom at .05: 2.7764
    assert far == pytest.approx(2.7764 * math.sqrt(2 / 3), abs=1e-3)
    # Means that lie just so far apart give that p, and with twelve tests a twelfth of it.
    for tests in (1, 12):
        apart = shows_from(3, tests)
        assert welch([-1, 0, 1], [apart - 1, apart, apart + 1]) == pytest.approx(0.05 / tests)
