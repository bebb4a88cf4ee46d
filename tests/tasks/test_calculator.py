"""The calculator works out what models write, and nothing else."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.tasks.calculator import Calculator, calculated, problems


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"),
        (" 12 + 30 ", "42"),
        ("(1+2)*3-4", "5"),
        ("7/2", "3.5"),
        ("2/3", "0.6666666667"),
        ("7//2", "3"),
        ("7%4", "3"),
        ("2**10", "1024"),
        ("-3", "-3"),
        (".5+.5", "1"),
        ("1/0", "error"),
        ("2+", "error"),
        ("", "error"),
        ("12 7", "error"),
        ("9**9**9", "error"),
        ("9" * 201, "error"),
        ("9" * 150, "error"),
        ("(" * 100 + "1" + ")" * 100, "error"),
        ("2**.5*1e3", "error"),
        ("(-8)**.5", "error"),
        ("__import__('os').system('true')", "error"),
        ("'a'*3", "error"),
        ("[1][0]", "error"),
        ("a", "error"),
    ],
)
def test_expressions(expression: str, value: str) -> None:
    assert calculated(expression) == value


@pytest.mark.parametrize("expression", ["...", "'a'", "1j", "None", "1e999 - 1e999"])
def test_what_is_no_number_is_an_error(expression: str) -> None:
    assert calculated(expression) == "error"


@given(st.text("0123456789.+-*/%() e", max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_expression_takes_no_time_and_raises_nothing(expression: str) -> None:
    start = time.thread_time()  # of this thread: other processes' work says nothing
    said = calculated(expression)
    assert time.thread_time() - start < 0.5
    assert said == "error" or float(said) == float(said)


def test_an_episode() -> None:
    calculator = Calculator()
    calculator.reset("84", unused=1)
    assert calculator.step("I need <calc>12*7</calc>") == ("<result>84</result>", 0.0, False)
    assert calculator.step(" so <answer> 84 </answer>") == ("", 1.0, True)
    assert calculator.step("<answer>84</answer> no, <answer>85</answer>") == ("", 0.0, True)
    assert calculator.step("no idea") == ("", 0.0, True)


def test_problems_and_their_demonstrations() -> None:
    train, test = problems("train"), problems("test")
    assert not {str(row["prompt"]) for row in train} & {str(row["prompt"]) for row in test}
    right = [f"<answer>{row['answer']}</answer>" in row["completion"][0]["content"] for row in train]
    assert 0.4 < sum(right) / len(right) < 0.65
    for row in train:
        calculator = Calculator()
        calculator.reset(row["answer"])
        call, closed, rest = row["completion"][0]["content"].partition("</calc>")
        if closed:
            observation, _, _ = calculator.step(call + closed)
            assert rest.startswith(observation)
            assert calculator.step(rest.removeprefix(observation)) == ("", 1.0, True)
