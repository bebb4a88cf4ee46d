"""Patterns found in completions, or all that they are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.errors import UsageError
from nanorlhf.rewards.regex import check, regex


@pytest.mark.parametrize(
    ("pattern", "completion", "found", "whole"),
    [
        (r"\d+", "42", 1, 1),
        (r"\d+", " 42\n", 1, 1),
        (r"\d+", "it is 42", 1, 0),
        (r"\d+", "42 it is", 1, 0),
        (r"\d+", "none", 0, 0),
        (r"yes", "Yes", 0, 0),
        (r"(?i)yes", "Yes", 1, 1),
        (r"a.b", "a\nb", 0, 0),
        (r"(?s)a.b", "a\nb", 1, 1),
        (r"(?m)^b$", "a\nb\nc", 1, 0),
        (r"a|ab", "ab", 1, 1),
        (r"x*", "", 1, 1),
        (r"<answer>(yes|no)</answer>$", "hm <answer>no</answer>", 1, 0),
        (r"\d+", [{"role": "assistant", "content": "42"}], 1, 1),
    ],
)
def test_table(pattern: str, completion: Any, found: float, whole: float) -> None:
    check(pattern)
    assert regex([completion], pattern=pattern, prompts=["?"]) == [found]
    assert regex([completion], pattern=pattern, full=True) == [whole]


@given(st.text())
def test_any_text_is_found_or_not(text: str) -> None:
    assert regex([text], pattern=r"\w+\s?")[0] in (0, 1)


@pytest.mark.parametrize("pattern", ["", "(", "*", "[z-a]", "(?P<a>.)(?P<a>.)"])
def test_a_pattern_must_be_one(pattern: str) -> None:
    with pytest.raises(UsageError, match="reward_options: regex"):
        check(pattern)
