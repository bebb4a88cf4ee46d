"""The repetition penalty by hand, and what it must not depend on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.errors import UsageError
from nanorlhf.rewards.repetition import check, repetition


@pytest.mark.parametrize(
    ("text", "ids", "by_words", "by_tokens"),
    [
        ("a b c d e", [1, 2, 3, 4, 5], 0, 0),
        ("a b c a b c", [1, 2, 3, 1, 2, 3], -1 / 4, -1 / 4),  # abc bca cab abc
        ("no no no no no", [7] * 5, -2 / 3, -2 / 3),
        ("No no NO", [1, 2, 3], 0, 0),
        ("No no NO no", [1, 2, 3, 4], -1 / 2, 0),
        ("aaaaaaaa", [9] * 8, 0, -5 / 6),  # letters, and scripts without spaces, show in tokens only
        ("好好好好好", [4] * 5, 0, -2 / 3),
        ("a b", [1, 2], 0, 0),
        ("", [], 0, 0),
    ],
)
def test_table(text: str, ids: list[int], by_words: float, by_tokens: float) -> None:
    assert repetition([text]) == pytest.approx([by_words])
    assert repetition([text], [ids]) == pytest.approx([by_tokens])
    assert repetition([[{"role": "assistant", "content": text}]], max_penalty=0.5) == pytest.approx([by_words / 2])


def test_ngrams_of_other_sizes() -> None:
    ids = [[1, 2, 1, 2]]
    assert [repetition(["?"], ids, ngram_size=n)[0] for n in (1, 2, 3, 4, 5)] == pytest.approx(
        [-1 / 2, -1 / 3, 0, 0, 0]
    )


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5), st.floats(0.01, 10))
def test_it_is_a_penalty_within_its_range_whatever_the_tokens_are_called(
    ids: list[int], size: int, penalty: float
) -> None:
    score = repetition(["?"], [ids], ngram_size=size, max_penalty=penalty)
    assert -penalty < score[0] <= 0
    assert score == repetition(["?"], [[token + 100 for token in ids]], ngram_size=size, max_penalty=penalty)


@given(st.text())
def test_any_text_has_a_score(text: str) -> None:
    assert -1 < repetition([text])[0] <= 0


@pytest.mark.parametrize("options", [{"ngram_size": 0}, {"ngram_size": 2.0}, {"ngram_size": True}, {"max_penalty": 0}])
def test_options_are_checked_as_they_are_read(options: dict[str, Any]) -> None:
    check(ngram_size=3, max_penalty=1)
    with pytest.raises(UsageError, match=next(iter(options))):
        check(**{"ngram_size": 3, "max_penalty": 1.0} | options)
