"""A sick step is told from a healthy one, in words, once."""

from __future__ import annotations

from typing import Any

import pytest

from nanorlhf.config.training import DIAGNOSES, WITHOUT_REWARDS
from nanorlhf.records import diagnosis

HEALTHY = {
    "loss": 0.1,
    "reward/mean": 0.5,
    "completion/truncated_fraction": 0.1,
    "groups/no_spread_fraction": 0.3,
    "entropy": 0.5,
    "kl": 0.01,
    "grad_norm": 1.0,
    "mismatch/mean_abs": 1e-5,
    "mismatch/limit": 1e-3,
}
SICK: dict[str, tuple[dict[str, Any], str]] = {
    "truncation": ({"completion/truncated_fraction": 0.95}, "95% of completions hit max_completion_length"),
    "no_spread": ({"groups/no_spread_fraction": 1.0}, "no group has two different rewards"),
    "entropy_collapse": (
        {"entropy": 0.04, "groups/no_spread_fraction": 0.9},
        "entropy fell from 0.5 to 0.04 nats a token, and 90% of groups earn one reward",
    ),
    "kl_runaway": ({"kl": 0.2}, "the policy is 0.2 nats a token from its reference, from 0.01"),
    "gradient_spike": ({"grad_norm": 30.0}, "the gradient's norm is 30, 30 times what it was"),
    "stale_engine": ({"mismatch/mean_abs": 0.2}, "engine and trainer disagree by 0.2 nats a token (more than 0.001)"),
}


def rows(*last: dict[str, Any]) -> list[dict[str, Any]]:
    """An evaluation, six healthy steps, and others."""
    made = [{"step": 0, "eval/reward": 0.1}, *(HEALTHY for _ in range(6)), *(HEALTHY | row for row in last)]
    return [{**row, "step": step} for step, row in enumerate(made)]


def test_every_kind_has_a_check_and_advice() -> None:
    assert diagnosis.ADVICE.keys() == diagnosis.CHECKS.keys() == SICK.keys() == set(DIAGNOSES)


@pytest.mark.parametrize("kind", SICK)
def test_what_is_wrong_is_said_when_it_begins(kind: str) -> None:
    change, words = SICK[kind]
    (remark,) = diagnosis.begun(rows(change))
    assert (remark.step, remark.kind, remark.advice) == (7, kind, diagnosis.ADVICE[kind])
    assert remark.words.startswith(words)
    assert diagnosis.begun(rows(change, change)) == []
    assert [r.step for r in diagnosis.remarks(rows(change, {}, change))] == [7, 9]


@pytest.mark.parametrize("kind", SICK)
def test_demonstrations_get_no_advice_for_rewards(kind: str) -> None:
    change, _ = SICK[kind]
    taught = [{name: value for name, value in row.items() if name != "reward/mean"} for row in rows(change)]
    assert [remark.kind for remark in diagnosis.remarks(taught)] == [kind] * (kind in WITHOUT_REWARDS)


def test_a_healthy_run_and_one_that_measures_little_get_no_remark() -> None:
    assert diagnosis.remarks(rows()) == diagnosis.remarks([]) == []
    assert diagnosis.remarks([{"step": 1, "loss": 0.1, "grad_norm": None, "kl": None}]) == []
    assert diagnosis.begun([{"step": 1, "loss": 0.1}]) == []


def test_low_entropy_is_no_collapse_while_groups_still_differ() -> None:
    assert diagnosis.begun(rows({"entropy": 0.01, "groups/no_spread_fraction": 0.5})) == []
    (alone,) = diagnosis.begun(rows({"entropy": 0.01, "groups/no_spread_fraction": None}))
    assert alone.words == "entropy fell from 0.5 to 0.01 nats a token"


def test_a_large_kl_needs_no_history() -> None:
    (remark,) = diagnosis.remarks([{"step": 1, "loss": 0.1, "reward/mean": 0.5, "kl": 1.5}])
    assert remark.words == "the policy is 1.5 nats a token from its reference"
