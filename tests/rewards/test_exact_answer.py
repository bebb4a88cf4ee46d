"""Exact answers in tags."""

from __future__ import annotations

from typing import Any

import pytest

from nanorlhf.rewards.exact_answer import exact_answer


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("<answer>2</answer>", "2", 1),
        ("<answer>\n2 </answer> I am sure.", " 2", 1),
        ("<answer>2</answer>", 2, 1),
        ("<answer>3</answer> <answer>2</answer>", "2", 1),
        ("<answer>2</answer> <answer>3</answer>", "2", 0),
        ("<answer>2.0</answer>", "2", 0),
        ("<answer>Two</answer>", "two", 0),
        ("2", "2", 0),
        ("<answer>2", "2", 0),
        ("", "", 0),
        ("<answer></answer>", "", 1),
        ("<answer>None</answer>", None, None),
        ([{"role": "assistant", "content": "<answer>2</answer>"}], "2", 1),
    ],
)
def test_table(completion: Any, answer: Any, reward: float | None) -> None:
    assert exact_answer([completion], [answer], level=[3]) == [reward]
