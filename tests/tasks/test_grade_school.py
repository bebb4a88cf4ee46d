"""Grade-school problems: no template in both splits; every answer has a number."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from nanorlhf.data.answers import after
from nanorlhf.tasks.grade_school import gsm_symbolic


def test_templates_are_in_one_split_and_problems_differ() -> None:
    train, test = gsm_symbolic("train"), gsm_symbolic("test")
    assert not set(train["template"]) & set(test["template"])
    assert Counter(Counter(train["template"]).values()) == {30: 70}
    assert Counter(Counter(test["template"]).values()) == {8: 15}
    assert len(set(train["question"])) == len(train)
    assert gsm_symbolic("test").to_list() == test.to_list(), "another call gives other problems"


def test_every_answer_ends_in_a_number() -> None:
    rows: Any = [*gsm_symbolic("train"), *gsm_symbolic("test")]
    numbers = [Fraction(after("####", row["answer"]) or "") for row in rows]
    assert len(numbers) == 70 * 30 + 15 * 8


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        gsm_symbolic("validation")
