"""The share of an answer that is right, worked out by hand."""

from __future__ import annotations

import pytest

from nanorlhf.rewards.prefix import prefix


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ("0014 0007 0000", 1),
        ("0014  0007\n0000 ", 1),  # white space does not matter
        ("0014 0007", 2 / 3),  # stopped early
        ("0014 0008 0000", 1 / 3),  # what is right after a mistake does not count
        ("0015 0007 0000", 0),
        ("", 0),
        ("0014 0007 0000 0000", 3 / 4),  # went on too long
        ("0014 0007 00001", 2 / 3),  # whole words only
    ],
)
def test_the_share_before_the_first_mistake(said: str, share: float) -> None:
    answer = "0014 0007 0000"
    assert prefix([said], [answer]) == [share]
    assert prefix([[{"role": "assistant", "content": said}]], [answer]) == [share]


def test_a_row_without_an_answer_cannot_be_scored() -> None:
    assert prefix(["1", "1", "1"], [None, " ", 1]) == [None, None, 1]
