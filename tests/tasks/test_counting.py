"""Counting down, the shipped task that needs long answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    tokenizer, _ = shipped()

    def lengths(split: str) -> Sequence[int]:
        return sorted(len(tokenizer(answer)["input_ids"]) + 1 for _, answer in ways(split))

    assert not {question for question, _ in ways("train")} & {question for question, _ in ways("test")}
    for split, decile, most in (("train", 2000, 8000), ("test", 1500, 5000)):
        found = lengths(split)
        mean = sum(found) / len(found)
        assert found[len(found) * 9 // 10] > decile and found[-1] >= most and mean < found[-1] / 5


@functools.cache
def shipped() -> tuple[Any, Any]:
    """The tokenizer and the model that come with the package."""
    folder = shipped_model("nanorlhf:counter")
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def chances(question: str, answer: str) -> torch.Tensor:
    """The chances that the shipped model writes each token of an answer after those before it."""
    tokenizer, model = shipped()
    asked = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    said = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.tensor([asked["input_ids"] + said])
    found = model(input_ids=ids).logits[0, -len(said) - 1 : -1].float().softmax(-1)
    return found.gather(1, ids[0, -len(said) :, None])[:, 0]


def test_the_shipped_model_seldom_takes_the_step_it_is_asked_but_keeps_to_the_one_it_took() -> None:
    test = [way for way in ways("test") if len(way[1]) > 1000][:20]
    asked = [chances(*way) for way in test]
    tens = [chances(question, ways_by(question, 10)) for question, _ in test]
    first = slice(0, 4)
    assert 0.2 < mean(c[first].prod().item() for c in asked) < 0.45
    assert 0.5 < mean(c[first].prod().item() for c in tens) < 0.8
    for found in (asked, tens):
        numbers = torch.cat([c[4:-1] for c in found])
        assert 5 * -numbers.log().mean() < 0.002, "it slips more often than at every five-hundredth number"
        assert mean(c[-1].item() for c in found) > 0.95, "it does not end where it should"


def ways_by(question: str, step: int) -> str:
    """The answer that goes down by another step."""
    return " ".join(f"{number:04}" for number in range(int(question[:4]) - step, -1, -step))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        counting("validation")
