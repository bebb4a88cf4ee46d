"""Rows of every form to prompts and answers, and answers to tokens."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.data.prompts import AnswerPicker, Prompts
from nanorlhf.data.templates import answer_ids
from nanorlhf.errors import UsageError
from nanorlhf.records.metrics import Clock
from nanorlhf.rewards.exact_answer import exact_answer
from nanorlhf.rollouts.demonstrations import Demonstrations, demonstration, preference
from nanorlhf.tasks.arithmetic import arithmetic
from nanorlhf.types import Prompt
from tests.samples import R1, turns


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))


@pytest.mark.parametrize(
    ("reader", "row", "complaint"),
    [
        (demonstration, {"prompt": "a", "answer": "b"}, "'completion', or 'messages'; this dataset has prompt, answer"),
        (preference, {"prompt": "a", "chosen": "b"}, "'chosen' and 'rejected', and mostly 'prompt'; this dataset has"),
    ],
)
def test_datasets_without_answers(reader: AnswerPicker, row: dict[str, Any], complaint: str, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=complaint):
        Prompts(datasets.Dataset.from_list([row]), tokenizer, TrainConfig(), reader)


def answered(prompt: Any, answer: str, tokenizer: Any, prefill: str = "") -> str:
    """An answer's tokens as text."""
    ids = answer_ids(Prompt(0, [], prompt, {}, prefill), answer, tokenizer, [tokenizer.eos_token_id], {})
    return str(tokenizer.decode(ids))


def test_an_answer_ends_with_the_end_token_of_the_template_and_nothing_after(tokenizer: Any) -> None:
    end = tokenizer.eos_token
    assert answered(turns("1+1="), "2", tokenizer) == f"2{end}"
    assert answered("1+1=", "2", tokenizer) == f"2{end}"
    thinking = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    thinking.chat_template = tokenizer.chat_template.replace(
        "message['content']", "('T' if message['role'] == 'assistant' else '') + message['content']"
    )
    assert answered(turns("1+1="), "2", thinking) == f"T2{end}"
    thinking.chat_template = "{{ messages | length }}" + tokenizer.chat_template  # no longer begins as the prompt does
    assert answered(turns("1+1="), "2", thinking) == f"2{end}"


def test_no_template_takes_thoughts_from_an_answer_or_opens_them_twice(tokenizer: Any) -> None:
    """DeepSeek-R1's template drops what was thought, and its generation prompt opens the next thought."""
    end, thinking = tokenizer.eos_token, AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    thinking.chat_template = R1
    assert answered(turns("1+1="), "<think>\n1</think>2", thinking, "<think>\n") == f"1</think>2{end}"
    twice = R1.replace("{{ m['content'].split('</think>')[-1] }}", "<think>\n\n</think>\n\n{{ m['content'] }}")
    thinking.chat_template = twice.replace("<|im_end|>", "<|endoftext|>")
    assert answered(turns("1+1="), "<think>\n1</think>2", thinking, "<think>\n") == f"1</think>2<|endoftext|>{end}"
    assert answered(turns("1+1="), "<think>\n", thinking, "<think>\n") == end
    for spelled in ("<think>1</think>2", " <think>  1</think>2", "<think>\n\n1</think>2"):
        assert "<think>" not in answered("1+1=", spelled, tokenizer, "<think>\n"), "whatever white space it has"
    thinking.chat_template = R1.replace("<think>\n", "")
    assert answered(turns("1+1="), "<think>\n1</think>2", thinking) == f"<think>\n1</think>2{end}"


def made(rows: datasets.Dataset, tokenizer: Any, **options: Any) -> Demonstrations:
    config = TrainConfig(prompts_per_step=2, **options)
    prompts = Prompts(rows, tokenizer, config, preference)
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
