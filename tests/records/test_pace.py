"""The pace of a rollout, by numbers worked out by hand."""

from __future__ import annotations

import pytest

from nanorlhf.records.pace import SLICES, Pace


def paced(*steps: tuple[float, int]) -> Pace:
    """Decode steps of so many seconds and sequences."""
    pace = Pace()
    pace.seconds, pace.sequences = [s for s, _ in steps], [n for _, n in steps]
    return pace


def test_the_tail_is_the_time_in_which_fewer_than_a_quarter_of_the_most_decode() -> None:
    metrics = paced((1.0, 8), (2.0, 3), (3.0, 2), (4.0, 1)).metrics()
    assert metrics["throughput/tail_fraction"] == pytest.approx(4 / 10), "two of eight are a quarter, one is less"
    assert metrics["throughput/sequences_mean"] == pytest.approx((8 + 6 + 6 + 4) / 10)


def test_the_curve_holds_every_token() -> None:
    curve = paced((6.0, 12), (3.0, 6), (3.0, 3)).curve()  # 12 s in 24 parts of half a second
    assert curve == [2.0] * 12 + [2.0] * 6 + [1.0] * 6
    uneven = paced(*[(0.1 * (1 + i % 3), 1 + i % 7) for i in range(50)])
    assert sum(uneven.curve()) * sum(uneven.seconds) / SLICES == pytest.approx(sum(uneven.sequences), rel=0.01)


def test_time_between_calls_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 11.0, 20.0, 22.0, 30.0])
    monkeypatch.setattr("nanorlhf.records.pace.time.perf_counter", lambda: next(clock))
    pace = Pace()
    for sequences in (4, 2):
        pace.begin()
        pace.note(sequences)
    assert (pace.seconds, pace.sequences) == ([1.0, 2.0], [4, 2])
    pace.clear()
    assert pace.metrics() == {}, "nothing was written"
