"""Thinking first, answering then, and nothing else."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.rewards.think_format import think_format


@pytest.mark.parametrize(
    ("completion", "tagged", "plain"),
    [
        ("<think>hm</think><answer>2</answer>", 1, 1),
        ("\n<think>\nhm\n</think>\n\n<answer>\n2\n</answer>\n", 1, 1),
        ("<think>a < b and b > c</think><answer><b>2</b></answer>", 1, 1),
        ([{"role": "assistant", "content": "<think>hm</think><answer>2</answer>"}], 1, 1),
        ("<think>hm</think> 2", 0, 1),
        ("<think>hm</think>", 0, 0),
        ("<think>hm</think>  \n", 0, 0),
        ("<think>hm", 0, 0),
        ("hm</think> 2", 0, 0),
        ("<answer>2</answer>", 0, 0),
        ("<answer>2</answer><think>hm</think>", 0, 0),
        ("<think><answer>2</answer></think>", 0, 0),
        ("<think>hm</think><answer>2</answer> bye", 0, 1),
        ("Well: <think>hm</think><answer>2</answer>", 0, 0),
        ("<think>hm</think> so <answer>2</answer>", 0, 1),
        ("<think>hm</think><answer>2</answer><answer>3</answer>", 0, 1),
        ("<think>hm</think><think>hm</think><answer>2</answer>", 0, 0),
        ("<think>a<think>b</think></think><answer>2</answer>", 0, 0),
        ("<think>one <answer> or two</think><answer>2</answer>", 0, 1),
        ("<think>hm</think><answer>2", 0, 1),
        ("<think>hm</think><answer></answer>", 0, 1),
        ("<think> </think><answer>2</answer>", 0, 0),
        ("<Think>hm</Think><Answer>2</Answer>", 0, 0),
        ("<think >hm</think ><answer>2</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_table(completion: Any, tagged: float, plain: float) -> None:
    assert think_format([completion], prompts=["?"]) == [tagged]
    assert think_format([completion], answer_tags=False) == [plain]


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " ", "<"])).map("".join))
def test_who_keeps_the_strict_form_keeps_the_loose_one(text: str) -> None:
    tagged, plain = think_format([text])[0], think_format([text], answer_tags=False)[0]
    assert {tagged, plain} <= {0, 1} and tagged <= plain


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<", "<think></think>", " "])
def test_long_texts_take_no_longer_than_their_length(piece: str) -> None:
    start = time.process_time()
    think_format([piece * 50_000, "<think>" + piece * 50_000])
    assert time.process_time() - start < 2
