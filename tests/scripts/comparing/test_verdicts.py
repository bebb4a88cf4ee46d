"""Figures of runs side by side, by hand."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from nanorlhf.errors import UsageError
from nanorlhf.records.directory import read_run
from nanorlhf.scripts.comparing.publish import read_runs, table_of_runs, table_text, tables, to_text
from nanorlhf.scripts.comparing.verdicts import (
    ALL_PHASES,
    FIGURES,
    Run,
    figures,
    level,
    pairs,
    read,
    shared,
    spread,
    verdicts,
)
from tests.scripts.made_up import write_run


def a_run(entry: str = "a", seed: int = 0, end: float = 1.0, seconds: float = 10.0) -> Run:
    """Reward from 0 to `end` on a straight line, over ten steps of ten completions."""
    return Run(
        entry=entry,
        seed=seed,
        command=f"python -m nanorlhf {entry}",
        reward="eval/reward",
        curve={"step": [0, 10], "seconds": [0, seconds], "samples": [0, 100], "reward": [0.0, end]},
        phases=dict.fromkeys(ALL_PHASES, 0.0) | {"rollout": seconds / 4, "update": 3 * seconds / 4},
        samples=100,
        tokens=4000,
        peak_gib=0.5,
        mismatch=2e-7,
        about={},
    )


def test_a_level_is_the_mean_of_the_last_fifth() -> None:
    assert level([0, 10], [0, 1], 10) == pytest.approx(0.9)
    assert level([0, 10], [0, 1], 5) == pytest.approx(0.45)
    # From 8 to 9 the line is at 0, from there it rises to 1: half a triangle of width 1 over a base of 2.
    assert level([0, 9, 10], [0, 0, 1], 10) == pytest.approx(0.25)
    assert level([0.0], [0.3], 0.0) == 0.3


def test_equal_time_is_that_of_the_shortest_run() -> None:
    runs = [a_run(seconds=10), a_run("b", seconds=20, end=0.8)]
    assert (shared(runs, "seconds"), shared(runs, "samples")) == (10, 100)
    found = figures(runs)
    assert found["time"] == pytest.approx([0.9, 0.8 * 0.45])
    assert found["samples"] == found["end"] == pytest.approx([0.9, 0.72])


def test_reward_an_hour_is_what_training_time_bought() -> None:
    """From .2 to .8 on a straight line, .74 over its last fifth: .54 in ten seconds, and in twice ten."""
    rising = replace(a_run(), curve=a_run().curve | {"reward": [0.2, 0.8]})
    slower = replace(rising, phases={phase: 2 * seconds for phase, seconds in rising.phases.items()})
    assert [run.costs()["reward an hour"] for run in (rising, slower)] == pytest.approx([0.54 * 360, 0.54 * 180])


def test_a_run_as_a_trainer_leaves_it(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run", steps=20))
    run = read(record, "grpo", "python -m nanorlhf grpo")
    steps = record.steps
    assert run.curve["step"] == [0, 10, 20]
    assert run.curve["reward"] == [row["eval/reward"] for row in record.rows if "eval/reward" in row]
    assert run.curve["samples"] == [0, 80, 160], "two groups of four a step"
    assert run.curve["seconds"][-1] == pytest.approx(sum(row["time/step"] for row in steps))
    assert run.seconds == pytest.approx(run.curve["seconds"][-1])
    assert run.phases["update"] == pytest.approx(20 * 0.7)
    assert run.phases["other"] == pytest.approx(20 * 0.02)
    assert (run.samples, run.tokens) == (160, 20 * 8 * 40)
    costs = run.costs()
    assert costs["tokens/s"] == pytest.approx(run.tokens / run.seconds)
    assert costs["rollout tokens/s"] == pytest.approx(run.tokens / run.phases["rollout"])
    assert run.mismatch == max(row["mismatch/mean_abs"] for row in steps)


def test_a_critics_first_lessons_cost_time_and_completions(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run", steps=10))
    record.rows[0].update({"value_init/seconds": 7.0, "value_init/episodes": 50})
    run = read(record, "ppo", "")
    assert (run.phases["value init"], run.curve["seconds"][0], run.curve["samples"][0]) == (7.0, 7.0, 50)


def test_only_what_exceeds_the_noise_is_said() -> None:
    near = [a_run("a", seed, end) for seed, end in enumerate((0.9, 1.0, 1.1))]
    far = [a_run("b", seed, end) for seed, end in enumerate((1.9, 2.0, 2.1))]
    found = pairs([*near, *far])
    assert {pair.figure for pair in found} == set(FIGURES)
    assert all((pair.better, pair.worse) == ("b", "a") and pair.exceeds_noise for pair in found)
    assert found[-1].by == pytest.approx(0.9)
    assert verdicts([*near, *far])[-2].startswith("b is better than a over the last fifth: +0.900 (p = ")
    same = verdicts([*near, *(replace(run, entry="c") for run in near)])
    assert same[0] == "No difference exceeds the noise at equal time, nor at equal samples, nor over the last fifth."


def test_what_has_no_spread_is_said_to_be_untested() -> None:
    """Runs of one entry that all came to the same, each in its own time, so that means differ by rounding."""
    a = [flat("a", seed, 1.0, 10 + seed / 7) for seed in range(3)]
    b = [flat("b", seed, 0.9, 11 + seed / 3) for seed in range(3)]
    assert len(set(figures([*a, *b])["time"])) > 2, "rounding"
    found = pairs([*a, *b])
    assert [(pair.better, pair.p, pair.exceeds_noise) for pair in found] == [("a", None, False)] * 3
    words = verdicts([*a, *b])
    assert words[2] == (
        "a is above b over the last fifth by 0.100, but the runs of neither differ among themselves: without any "
        "spread this cannot be tested."
    )
    assert not any("is better" in line or "No difference" in line for line in words)
    c = [a_run("c", seed, end) for seed, end in enumerate((0.5, 0.6, 0.7))]  # of three pairs two can be tested
    assert [pair.p is None for pair in pairs([*a, *b, *c])] == [True, False, False] * 3
    assert "c over the last fifth" in " ".join(verdicts([*a, *b, *c])) and '"p": null' in to_text([*a, *b, *c])
    same = verdicts([*a, *(replace(run, entry="d") for run in a)])
    assert same[0] == "No difference exceeds the noise at equal time, nor at equal samples, nor over the last fifth."


def flat(entry: str, seed: int, reward: float, seconds: float) -> Run:
    """A run that is at its reward from the start, and was measured on the way."""
    run = a_run(entry, seed, seconds=seconds)
    points = [0.0, 0.83, 0.9, 0.97, 1.0]
    ends = {"step": 10.0, "seconds": seconds, "samples": 100.0}
    curve = {axis: [end * point for point in points] for axis, end in ends.items()}
    return replace(run, curve=curve | {"reward": [reward] * 5})


def test_more_pairs_need_more() -> None:
    a = [a_run("a", seed, end) for seed, end in enumerate((0.8, 1.0, 1.2))]
    b = [a_run("b", seed, end) for seed, end in enumerate((1.4, 1.6, 1.8))]  # p = .02 on its own
    c = [a_run("c", seed, end) for seed, end in enumerate((1.0, 1.3, 1.6))]
    assert any(pair.exceeds_noise for pair in pairs([*a, *b]))
    assert not any(pair.exceeds_noise for pair in pairs([*a, *b, *c]))


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([a_run()], "One entry alone"),
        ([a_run(), a_run("b")], "One seed says nothing of noise"),
        ([a_run(), a_run(seed=1, end=0.9), a_run("b"), a_run("b", 1, 0.8)], "Two seeds say little"),
        ([a_run(), a_run(seed=1, end=0.9), a_run("b"), a_run("b", 1, 0.8), a_run("c")], "one seed has no verdict"),
    ],
)
def test_too_few_runs_are_said(runs: list[Run], said: str) -> None:
    assert any(said in line for line in verdicts(runs))


def test_different_rewards_are_not_compared() -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        figures([a_run(), replace(a_run("b"), reward="reward/mean")])


def test_tables_hold_the_figures(tmp_path: Path) -> None:
    runs = [a_run("a", seed, end, seconds=10 + seed) for seed, end in enumerate((0.9, 1.0, 1.1))]
    rewards, costs, phases = tables(runs)
    assert rewards.rows == [["a", "3", "0.000 ± 0.000", spread(figures(runs)["time"], ".3f"), *["0.900 ± 0.090"] * 2]]
    assert rewards.heads == ["", "seeds", "at the start", "after 10 s", "after 100 completions", "over the last fifth"]
    assert "means over the last fifth of the way there" in rewards.caption
    assert costs.rows[0][:2] == ["a", "11 ± 1"]
    assert costs.rows[0][-1] == "2e-07"
    assert phases.heads == ["", "rollout", "update"]
    assert table_text(phases).splitlines()[0] == "| | rollout | update |"
    rows = list(csv.DictReader(io.StringIO(table_of_runs(runs))))
    assert [float(row["over_the_last_fifth"]) for row in rows] == pytest.approx([0.81, 0.9, 0.99])
    assert [float(row["seconds_update"]) for row in rows] == pytest.approx([7.5, 8.25, 9.0])
    (tmp_path / "comparison.json").write_text(to_text(runs))
    assert read_runs(tmp_path / "comparison.json") == runs
