"""Rows of every form to prompts and answers, and answers to tokens."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.arithmetic import arithmetic
from nanorlhf.config import shipped_model
from nanorlhf.data import Prompts
from nanorlhf.demonstrations import Demonstrations, Reader, answer_ids, demonstration, preference, read
from nanorlhf.errors import UsageError
from nanorlhf.metrics import Clock
from nanorlhf.options import TrainConfig
from nanorlhf.rewards.exact_answer import exact_answer


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


FORMS: list[tuple[Reader, dict[str, Any], Any, list[str]]] = [
    (demonstration, {"prompt": "1+1=", "completion": "2"}, "1+1=", ["2"]),
    (demonstration, {"prompt": turns("1+1="), "completion": said("2")}, turns("1+1="), ["2"]),
    (demonstration, {"messages": turns("1+1=", "3", "no", "2")}, turns("1+1=", "3", "no"), ["2"]),
    (demonstration, {"question": "1+1=", "messages": turns("hi", "ho")}, turns("hi"), ["ho"]),
    (preference, {"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1=", ["2", "3"]),
    (preference, {"prompt": turns("a"), "chosen": said("b"), "rejected": said("c")}, turns("a"), ["b", "c"]),
    (preference, {"prompt": "a", "chosen": turns("a", "b"), "rejected": turns("a", "c")}, turns("a"), ["b", "c"]),
    (preference, {"chosen": turns("a", "b"), "rejected": turns("a", "b")}, turns("a"), ["b", "b"]),
    (preference, {"chosen": "Q: x\nA: yes", "rejected": "Q: x\nA: yeah"}, "Q: x\nA:", [" yes", " yeah"]),
    (preference, {"chosen": "Q: x\nA: no", "rejected": "Q: x\nA: no sir"}, "Q: x\nA:", [" no", " no sir"]),
    (preference, {"chosen": "Q: x\nyes", "rejected": "Q: x\nno"}, "Q: x\n", ["yes", "no"]),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))


@pytest.mark.parametrize(("reader", "row", "prompt", "answers"), FORMS)
def test_forms_of_a_row(reader: Reader, row: dict[str, Any], prompt: Any, answers: list[str]) -> None:
    kept = read(datasets.Dataset.from_list([row, row]), reader, "prompt")
    assert kept["prompt"][:] == [prompt] * 2
    assert kept["demonstrations"][:] == [answers] * 2
    assert set(row) <= set(kept.column_names)  # rewards may want any of them


@pytest.mark.parametrize(
    ("reader", "row", "complaint"),
    [
        (demonstration, {"prompt": "a", "answer": "b"}, "'completion', or 'messages'; this dataset has prompt, answer"),
        (demonstration, {"messages": turns("a", "b", "c")}, "one message of the assistant's, and not .*'user'"),
        (preference, {"prompt": "a", "chosen": "b"}, "'chosen' and 'rejected', and mostly 'prompt'; this dataset has"),
        (preference, {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "x")}, "one message of the assist"),
        (preference, {"chosen": "yes", "rejected": "no"}, "must begin alike: 'yes'"),
    ],
)
def test_rows_that_cannot_be_read(reader: Reader, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read(datasets.Dataset.from_list([row]), reader, "prompt")


def test_an_answer_ends_with_the_end_token_of_the_template_and_nothing_after(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    assert answer_ids(turns("1+1="), "2", tokenizer, [end]) == [*tokenizer.encode("2"), end]
    assert answer_ids("1+1=", "2", tokenizer, [end]) == [*tokenizer.encode("2"), end]
    thinking = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    thinking.chat_template = tokenizer.chat_template.replace(
        "message['content']", "('T' if message['role'] == 'assistant' else '') + message['content']"
    )
    assert answer_ids(turns("1+1="), "2", thinking, [end]) == [*tokenizer.encode("T2"), end]
    thinking.chat_template = "{{ messages | length }}" + tokenizer.chat_template  # no longer begins as the prompt does
    assert answer_ids(turns("1+1="), "2", thinking, [end]) == [*tokenizer.encode("2"), end]


def made(rows: datasets.Dataset, tokenizer: Any, **options: Any) -> Demonstrations:
    config = TrainConfig(prompts_per_step=2, **options)
    prompts = Prompts(read(rows, preference, "prompt"), tokenizer, config)
    return Demonstrations(config, tokenizer, prompts, prompts.held_out(3), [tokenizer.eos_token_id])


def test_a_step_of_pairs(tokenizer: Any) -> None:
    rows = arithmetic("train").select(range(5))
    source = made(rows, tokenizer)
    rollout = source.rollout(3, Clock(), lambda tokens: None)
    assert rollout.group.tolist() == [0, 0, 1, 1]
    assert rollout.rewards.tolist() == [1, 0, 1, 0]
    assert source.held_out and len(source.held_out.samples) == 6
    again = made(rows, tokenizer).rollout(3, Clock(), lambda tokens: None)
    assert [s.completion_ids for s in again.samples] == [s.completion_ids for s in rollout.samples]
    for s in rollout.samples:
        row = rows[s.prompt.index]
        assert s.text == row["chosen" if s.reward else "rejected"][0]["content"]
        assert s.completion_ids == [*tokenizer.encode(s.text), tokenizer.eos_token_id]
        assert s.stopped


def test_long_answers_are_cut_and_have_no_end(tokenizer: Any) -> None:
    source = made(arithmetic("train").select(range(5)), tokenizer, max_completion_length=2)
    samples = source.rollout(1, Clock(), lambda tokens: None).samples
    assert [len(s.completion_ids) for s in samples] == [2] * 4
    assert not any(s.stopped or tokenizer.eos_token_id in s.completion_ids for s in samples)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_shipped_answers_are_right_where_they_should_be(split: str) -> None:
    rows: Any = arithmetic(split)
    for column, right in (("completion", 1.0), ("chosen", 1.0), ("rejected", 0.0)):
        assert set(exact_answer(rows[column][:], rows["answer"][:])) == {right}
    bare = sum("<answer>" not in turn[0]["content"] for turn in rows["rejected"])
    assert 0.45 < bare / len(rows) < 0.55
