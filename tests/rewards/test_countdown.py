"""Countdown: what reaches the target by the rules, what cheats, and what no text can make it do."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.errors import UsageError
from nanorlhf.rewards.countdown import check, countdown, read, value_of

NUMS = [3, 7, 8, 9]  # 9 * 8 - 7 * 3 = 51


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("9 * 8 - 7 * 3", 1),
        ("(9*8)-(7*3)", 1),
        ("9 \u00d7 8 \u2212 7 \u00d7 3", 1),
        ("-(7*3) + 9*8", 1),
        ("((9)*(8))-7*3", 1),
        ("9 * 8 - 7 * 3 + 0", 0.1),  # 0 is not among them
        ("51", 0.1),
        ("9 * 8 - 21", 0.1),
        ("9 * 8 - 7 - 7 - 7 * 3 / 3", 0.1),
        ("9 + 8 + 7 + 3", 0.1),
        ("9 * 8 / (7 - 7) + 3", 0.1),
        ("98 - 73", 0.1),
        ("9 * 8 - 7 * 3 = 51", 0),
        ("9 ** 8 - 7 * 3", 0),
        ("9 // 8 + 7 * 3", 0),
        ("9 * 8 - 7 * 3.0", 0),
        ("9 * 8 - 7 * 0_3", 0),
        ("9 * 8 - 7 * 03", 0),
        ("9 * 8 - (7, 3)", 0),
        ("9 8 7 3", 0),
        ("9(8) - 7 * 3", 0),
        ("9 * 8 - 7 *", 0),
        ("(9 * 8 - 7 * 3", 0),
        ("__import__('os').abort()", 0),
        ("9 * 8\n- 7 * 3", 0),
        ("٩ * 8 - 7 * 3", 0),
        ("nine times eight", 0),
        ("", 0),
    ],
)
def test_table(answer: str, reward: float) -> None:
    text = f"<think>\n3 + 7 is 10</think> <answer> {answer} </answer>"
    assert countdown([text], [51], [NUMS], format_score=0.1) == [reward]
    assert countdown([text], [51], [NUMS]) == [float(reward == 1)]
    assert countdown([answer], [51], [NUMS], format_score=0.1) == [0]  # without tags


def test_numbers_are_used_as_often_as_they_are_there() -> None:
    texts = [
        "<answer>4 + 4</answer>",
        "<answer>4 * 2</answer>",
        "<answer>4 + 4 * 2 / 2</answer>",
        "<answer>4+2+2</answer>",
    ]
    target, numbers = [8] * 4, [[4, 4, 2]] * 4
    assert countdown(texts, target, numbers=numbers) == [0, 0, 0, 0]
    assert countdown(texts, target, numbers, use_all=False) == [1, 1, 0, 0]
    assert countdown(["<answer>4 * 4 / 2</answer>"], target=["8"], numbers=[["4", "4", "2"]]) == [1]


def test_what_divides_by_zero_is_wrong() -> None:
    assert countdown(["<answer>8 / (3 - 3)</answer>"] * 2, [0, 8], [[8, 3, 3]] * 2, format_score=0.1) == [0.1, 0.1]


def test_fractions_are_exact() -> None:
    assert countdown(["<answer>8 / (3 - 8 / 3)</answer>"], [24], [[8, 8, 3, 3]]) == [1]
    assert countdown(["<answer>1 / 3 + 1 / 3 + 1 / 3</answer>"], [1], [[1, 1, 1, 3, 3, 3]]) == [1]


def test_a_row_without_its_numbers_is_not_scored() -> None:
    answer = "<answer>1 + 1</answer>"
    assert countdown([answer] * 3, [2, None, 2], [[1, 1], [1, 1], None]) == [1, None, None]
    with pytest.raises(UsageError, match="'nums' or 'numbers'"):
        countdown([answer], [2])


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 100_000,
        "(" * 140 + "1" + ")" * 140,
        "-" * 290 + "1",
        "9*" * 140 + "9",
        "9" * 300,
        "1/" * 149 + "1",
        "*" * 250,
    ],
)
def test_nothing_is_too_deep_or_too_large(answer: str) -> None:
    start = time.process_time()
    assert countdown([f"<answer>{answer}</answer>"], [51], [NUMS], format_score=0.5)[0] in (0, 0.5)
    assert time.process_time() - start < 1


@given(st.text(alphabet=st.sampled_from("0123456789+-*/() ") | st.characters()))
def test_any_text_has_a_score(text: str) -> None:
    assert countdown([text, f"<answer>{text}</answer>"], [51] * 2, [NUMS] * 2, format_score=0.1)[1] in (0, 0.1, 1)


expressions = st.recursive(
    st.integers(0, 99).map(lambda n: (str(n), Fraction(n))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda t: (
            f"({t[0][0]} {t[1]} {t[2][0]})",
            {"+": t[0][1] + t[2][1], "-": t[0][1] - t[2][1], "*": t[0][1] * t[2][1]}[t[1]],
        )
    ),
    max_leaves=8,
)


@given(expressions)
def test_values_are_those_of_arithmetic(case: tuple[str, Fraction]) -> None:
    tree = read(case[0])
    assert tree is not None and value_of(tree) == case[1]


@pytest.mark.parametrize("score", [1, -0.1])
def test_options_are_checked_as_they_are_read(score: float) -> None:
    check(format_score=0.1)
    with pytest.raises(UsageError, match="format_score"):
        check(format_score=score)
