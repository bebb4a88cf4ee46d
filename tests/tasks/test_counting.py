"""Counting down, the shipped task that needs long answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanorlhf.config.names import shipped_model
from nanorlhf.tasks.counting import counting, ways


def test_every_answer_goes_down_by_the_step_as_far_as_it_can() -> None:
    row: Any
    for row in [*counting("train"), *counting("test")]:
        (message,) = row["prompt"]
        start, step = map(int, message["content"].split("-"))
        numbers = [int(word) for word in row["answer"].split()]
        assert numbers == list(range(start - step, -1, -step)) and 0 <= numbers[-1] < step
        assert row["completion"] == [{"role": "assistant", "content": row["answer"]}]
        assert {len(word) for word in row["answer"].split()} == {4}


def test_no_question_is_in_both_splits_and_both_have_the_long_tail() -> None:
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:counter"))

    def lengths(split: str) -> Sequence[int]:
        return sorted(len(tokenizer(answer)["input_ids"]) + 1 for _, answer in ways(split))

    assert not {question for question, _ in ways("train")} & {question for question, _ in ways("test")}
    for split, decile, most in (("train", 2000, 8000), ("test", 1500, 5000)):
        found = lengths(split)
        mean = sum(found) / len(found)
        assert found[len(found) * 9 // 10] > decile and found[-1] >= most and mean < found[-1] / 5


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        counting("validation")
