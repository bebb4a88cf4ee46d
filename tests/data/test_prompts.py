"""Rows to prompts: order, limits, examples, and quick starts on many rows."""

from __future__ import annotations

import random
import time
from typing import Any

import datasets
import pyarrow
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.data import prompts as data
from nanorlhf.data.prompts import Prompts
from nanorlhf.errors import UsageError
from tests.samples import turns

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10, 17)]
LONG = {"prompt": "1" * 40, "answer": "?"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))


def prompts_of(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Prompts:
    return Prompts(datasets.Dataset.from_list(rows), tokenizer, TrainConfig(**options))


def test_every_epoch_has_every_prompt_once_in_another_order(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = prompts_of(ROWS, tokenizer, seed=3)
    stream = [p.index for step in range(7) for p in prompts.batch(step, 3)]
    epochs = [stream[i : i + 7] for i in (0, 7, 14)]
    assert [sorted(e) for e in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1]


def test_order_depends_on_seed_and_step_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    def order(seed: int, steps: list[int]) -> list[list[int]]:
        prompts = prompts_of(ROWS, tokenizer, seed=seed)
        return [[p.index for p in prompts.batch(step, 3)] for step in steps]

    assert order(0, [0, 1, 2, 3])[3] == order(0, [3])[0]
    assert order(0, [0, 1]) != order(1, [0, 1])


def test_rows_that_do_not_fit_are_dropped_and_counted_by_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [LONG, *ROWS, {"prompt": "", "answer": ""}, {"prompt": None, "answer": "?"}]
    prompts = prompts_of(rows, tokenizer, max_prompt_length=20)
    assert prompts.dropped == 3
    assert prompts.summary() == "7 prompts (3 dropped: 2 empty, 1 longer than 20 tokens)"
    assert sorted(p.index for p in prompts.batch(0, 7)) == list(range(1, 8))
    with pytest.raises(UsageError, match="of 7 rows 7 dropped: 7 longer than 2 tokens"):
        prompts_of(ROWS, tokenizer, max_prompt_length=2)


def test_many_rows_are_looked_at_when_their_turn_comes(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 rows 8 are looked at first: the others that do not fit give their place away, and nothing else changes."""
    rows = [LONG if i % 4 == 0 else {"prompt": f"{i}+1=", "answer": ""} for i in range(40)]
    small = {i for i in range(40) if i % 4}
    monkeypatch.setattr(data, "LOOK", 8)
    prompts = prompts_of(rows, tokenizer, max_prompt_length=20)
    known = prompts.dropped
    assert 0 < known < 10
    assert f"40 rows (of 8 looked at {known} dropped" in prompts.summary()
    epoch = [p.index for p in prompts.batch(0, 40 - known)]
    assert set(epoch) == small
    assert prompts.dropped == 10
    again = prompts_of(rows, tokenizer, max_prompt_length=20)
    assert [p.index for p in again.batch(3, 5)] == [p.index for p in prompts.batch(3, 5)]
    assert {p.index for p in prompts.beside(50, 1)} <= small
    assert [p.index for p in again.beside(9, 1, 2)] == [p.index for p in prompts.beside(9, 1, 2)]
    fresh = prompts_of(rows, tokenizer, max_prompt_length=20, seed=5)
    held_out = [p.index for p in fresh.held_out(25)]
    assert len(set(held_out)) == 25 and set(held_out) <= small
    assert held_out == [p.index for p in again.held_out(25)]
    assert len(fresh.sample(99, random.Random(0))) == 30


def test_a_dataset_that_turns_bad_later_ends_with_a_reason(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "LOOK", 3)
    prompts = prompts_of([*ROWS], tokenizer)
    monkeypatch.setattr(prompts.maker, "limit", 1)
    with pytest.raises(UsageError, match="hardly a prompt can be used"):
        prompts.batch(0, 1)


def test_a_row_of_another_type_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="row 0 of the dataset: text or a list of messages is wanted, and not 3"):
        prompts_of([{"prompt": 3}], tokenizer)


def test_four_hundred_thousand_rows_start_in_seconds(tokenizer: PreTrainedTokenizerBase) -> None:
    columns = {"query": [f"{i} " * 40 for i in range(200)] * 2000, "response": ["The answer is: 1"] * 400_000}
    rows = datasets.Dataset(pyarrow.table(columns))
    start = time.process_time()
    prompts = Prompts(rows, tokenizer, TrainConfig(max_prompt_length=150, prompt_template="{query}"))
    batch = prompts.batch(5000, 64)
    assert time.process_time() - start < 15  # all of it would take minutes
    assert prompts.looked == 4096 and 1500 < prompts.dropped < 2600
    assert all(p.columns["query"][2] == " " or p.columns["query"][1] == " " for p in batch)


def test_answers_that_a_pattern_never_finds_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="answer_pattern='gsm8k' finds no answer in any of 7 rows"):
        prompts_of(ROWS, tokenizer, answer_pattern="gsm8k")
    assert prompts_of(ROWS, tokenizer, answer_pattern="last_number").batch(0, 1)[0].columns["answer"]


def test_examples_come_from_the_training_rows_and_are_never_the_row_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(4):
        prompts = prompts_of(ROWS, tokenizer, few_shot=2, seed=seed)
        for prompt in prompts.batch(0, 7):
            row = ROWS[prompt.index]
            *solved, last = str(prompt.text).split("\n\n")
            assert last == row["prompt"]
            assert len(set(solved)) == 2 and row["prompt"] not in " ".join(solved)
            assert set(solved) <= {f"{r['prompt']} {r['answer']}" for r in ROWS}
        assert prompts.examples == prompts_of(ROWS, tokenizer, few_shot=2, seed=seed).examples
    shown = prompts_of(ROWS, tokenizer, few_shot=2).examples
    unseen = Prompts(datasets.Dataset.from_list([LONG]), tokenizer, TrainConfig(few_shot=2), examples=shown)
    assert str(unseen.batch(0, 1)[0].text).endswith(f"\n\n{LONG['prompt']}")
    with pytest.raises(UsageError, match="few_shot=7 needs 8 rows with a prompt and an answer"):
        prompts_of(ROWS, tokenizer, few_shot=7)
    with pytest.raises(UsageError, match="few_shot=1 needs 2 rows"):
        prompts_of([{"prompt": "a"}, {"prompt": "b"}], tokenizer, few_shot=1)


def test_examples_in_a_chat_are_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": turns(f"{i}+1="), "answer": i + 1} for i in range(5)]
    prompt = prompts_of(rows, tokenizer, few_shot=2, system_prompt="add").batch(0, 1)[0]
    assert [m["role"] for m in prompt.text if not isinstance(m, str)] == ["system", *["user", "assistant"] * 2, "user"]
