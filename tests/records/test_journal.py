"""The kept part of a long run says all that the whole of it would."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nanorlhf.records import diagnosis
from nanorlhf.records.console import TRAINING, curve, summary
from nanorlhf.records.directory import training_seconds
from nanorlhf.records.journal import FIRST, LAST, History


def made_up(count: int) -> list[dict[str, Any]]:
    """An evaluation and steps, sick ones among them."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = [{"step": 0, "eval/reward": 0.2, "value_init/seconds": 2.0}]
    for step in range(1, count + 1):
        row: dict[str, Any] = {"step": step, "loss": 0.1, "reward/mean": draw.random(), "time/step": draw.random()}
        row |= {
            "entropy": draw.choice([0.5, 0.01]),
            "grad_norm": draw.choice([draw.random(), 30 + draw.random(), None]),
        }
        row |= {"kl": draw.choice([0.001, 0.06]), "groups/no_spread_fraction": draw.choice([0.5, 0.9])}
        row |= {"tokens/rollout": 10, "tokens/trained": 10, "memory/peak_gib": 1.0, "other": step}
        rows.append(row)
    return rows


def test_a_step_is_judged_as_if_all_were_kept() -> None:
    rows, history, seen = made_up(200), History(), 0
    for at, row in enumerate(rows):
        history.append(row)
        assert diagnosis.begun(history.telling) == diagnosis.begun(rows[: at + 1])
        if at > 1:
            assert diagnosis.look(history.telling, len(history.telling) - 2) == diagnosis.look(rows, at - 1)
        seen += bool(diagnosis.begun(history.telling))
    assert seen > 20, "there was something to see"
    assert len(history.telling) == FIRST + LAST


def test_pictures_and_times_are_those_of_all_steps(tmp_path: Any) -> None:
    rows = made_up(100)
    history = History(rows)
    assert history.seconds == pytest.approx(training_seconds(rows))
    assert curve(history.drawn, TRAINING[0]) == curve(rows, TRAINING[0])
    assert summary(history.drawn, tmp_path) == summary(rows, tmp_path)
    assert all("other" not in row for row in history.drawn)
