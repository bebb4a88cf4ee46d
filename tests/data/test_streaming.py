"""Prompts of a stream: the order repeats, resumes and mixes; nothing is read that is not needed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.data import prompts as data
from nanorlhf.data import streaming
from nanorlhf.data.streaming import Stream, prompts_of
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.rollouts.demonstrations import demonstration
from nanorlhf.types import Prompt
from tests.test_trainer import assert_same_outcome, small, take

SIZE = 30
LONG = {0, 9, 20}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 8)


def rows(size: int = SIZE) -> Iterator[dict[str, Any]]:
    for i in range(size):
        yield {"prompt": "1" * 40 if i in LONG else f"{i}=", "completion": str(i)}


def made(tokenizer: PreTrainedTokenizerBase, make: Any = rows, **options: Any) -> Stream:
    given = datasets.IterableDataset.from_generator(make)
    prompts = prompts_of(given, tokenizer, TrainConfig(max_prompt_length=20, **options), demonstration)
    assert isinstance(prompts, Stream)
    return prompts


def numbers(prompts: list[Prompt]) -> list[int]:
    return [int(str(p.text)[:-1]) for p in prompts]


def test_every_epoch_has_every_prompt_in_another_order_and_others_where_one_does_not_fit(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompts = made(tokenizer)
    assert prompts.dropped <= 1
    epochs = [numbers(prompts.batch(step, SIZE)) for step in range(2)]
    assert [set(epoch) for epoch in epochs] == [set(range(SIZE)) - LONG] * 2
    assert epochs[0] != sorted(epochs[0])
    everything = made(tokenizer, lambda: ({"prompt": f"{i}=", "completion": ""} for i in range(SIZE)))
    epochs = [numbers(everything.batch(step, SIZE)) for step in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(SIZE))] * 2
    assert epochs[0] != epochs[1]
    assert "prompts from a stream (6 dropped: 6 longer than 20 tokens so far)" in prompts.summary()


def test_resuming_reads_rows_and_makes_no_prompt_of_them(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, read = made(tokenizer), []
    monkeypatch.setattr(prompts, "maker", lambda number, row: read.append(number) or Prompt(number, [1], "1=", {}))
    prompts.batch(4, 5)
    assert len(read) == 5


def test_order_depends_on_seed_and_step_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    straight = made(tokenizer)
    batches = [numbers(straight.batch(step, 5)) for step in range(12)]
    resumed = made(tokenizer)
    assert numbers(resumed.batch(9, 5)) == batches[9]
    assert numbers(resumed.batch(3, 5)) == batches[3]
    assert numbers(resumed.batch(0, 1)) == batches[0][:1]
    assert numbers(resumed.batch(0, 5)) == batches[0]
    assert numbers(made(tokenizer, seed=1).batch(0, 5)) != batches[0]
    ahead = made(tokenizer)
    ahead.sample(20, random.Random(0))  # what a critic is taught by is forgotten, or other rows would take places
    assert [numbers(ahead.batch(step, 5)) for step in range(12)] == batches


def test_what_lies_beside_the_order_is_still_to_come_and_repeats(tokenizer: PreTrainedTokenizerBase) -> None:
    straight, resumed = made(tokenizer), made(tokenizer)
    for step in range(4):
        straight.batch(step, 5)
    resumed.batch(3, 5)
    found = numbers(straight.beside(20, 4, 0))
    assert found == numbers(resumed.beside(20, 4, 0)) != numbers(resumed.beside(20, 4, 1))
    assert set(found) <= {int(row["completion"]) for _, row in straight.buffer} - LONG
    assert numbers(straight.batch(4, 5)) == numbers(resumed.batch(4, 5))


def test_held_out_prompts_are_the_first_whatever_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in (0, 1):
        prompts = made(tokenizer, seed=seed)
        assert numbers(prompts.held_out(9)) == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert len(prompts_of(datasets.IterableDataset.from_generator(rows), tokenizer, TrainConfig()).held_out(99)) == 30


def test_no_more_is_read_than_is_needed(tokenizer: PreTrainedTokenizerBase) -> None:
    most = [0]

    def endless() -> Iterator[dict[str, Any]]:
        for i in range(10**9):
            most[0] = max(most[0], i)
            yield {"prompt": f"{i}=", "completion": "1"}

    prompts = made(tokenizer, endless, few_shot=1)
    assert len(prompts.batch(2, 4)) == 4
    assert most[0] <= 8 + 12 + 1


@pytest.mark.parametrize("options", [{}, {"few_shot": 1}])
def test_streams_that_cannot_serve(
    options: dict[str, Any], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield from rows(4)
        raise OSError("the line is dead")

    def nothing() -> Iterator[dict[str, Any]]:
        yield from ()

    def useless() -> Iterator[dict[str, Any]]:
        for _ in range(1000):
            yield {"prompt": "", "completion": "a"}

    def once() -> Iterator[dict[str, Any]]:
        yield from (left.pop() for _ in list(left))

    left = list(rows(6))
    with pytest.raises(UsageError, match="the stream gives rows only once, and there were 4"):
        made(tokenizer, once).batch(0, 9)
    monkeypatch.setattr(data, "LOOK", 50)
    monkeypatch.setattr(streaming, "LOOK", 50)
    with pytest.raises(UsageError, match="cannot be read: OSError: the line is dead"):
        made(tokenizer, broken, **options).batch(0, 5)
    with pytest.raises(UsageError, match="the dataset has no rows"):
        made(tokenizer, nothing, **options)
    with pytest.raises(UsageError, match=r"hardly a prompt can be used: 50 dropped: 50 empty|few_shot=1 needs 2 rows"):
        made(tokenizer, useless, **options)


def test_a_run_on_a_stream_says_what_it_dropped_and_resumes_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"max_prompt_length": 20, "dynamic_sampling": 1, "eval_steps": 0, "reward_workers": 0}
    options["dataset_test_split"] = None

    def run(name: str, **more: Any) -> GRPOTrainer:
        args = GRPOConfig(**small(tmp_path / name) | options | more)
        given = datasets.IterableDataset.from_generator(lambda: ({**row, "answer": "1"} for row in rows()))
        return GRPOTrainer(args=args, train_dataset=given)

    run("whole").train()
    said = capsys.readouterr().out
    assert "prompts from a stream (1 dropped: 1 longer than 20 tokens so far), 0 held out" in said
    assert re.search(r"in all, [23] dropped: [23] longer than 20 tokens", said)
    take(run("parts"), 2)
    take(run("parts", resume=str(tmp_path / "parts")), 2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")
