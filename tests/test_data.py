"""Rows to prompts: sources, order, limits."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.config import shipped_model
from nanorlhf.data import Prompts, load
from nanorlhf.errors import UsageError
from nanorlhf.options import TrainConfig

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10, 17)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder", "saved"])
def test_local_sources(kind: str, tmp_path: Path) -> None:
    made, path = datasets.Dataset.from_list(ROWS), tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        made.to_json(path)
    elif kind == "csv":
        made.to_csv(path)
    elif kind == "parquet":
        made.to_parquet(path)
    elif kind == "folder":
        path.mkdir()
        made.to_json(path / "train.jsonl")
    else:
        datasets.DatasetDict({"train": made}).save_to_disk(path)
    loaded = load(str(path), None, "train")
    assert loaded["prompt"][:] == [row["prompt"] for row in ROWS]
    assert [str(a) for a in loaded["answer"]] == [row["answer"] for row in ROWS]


def test_a_missing_hub_dataset_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="nobody/nothing"):
        load("nobody/nothing", None, "train")


def test_every_epoch_has_every_prompt_once_in_another_order(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = Prompts(datasets.Dataset.from_list(ROWS), tokenizer, TrainConfig(seed=3))
    stream = [p.index for step in range(7) for p in prompts.batch(step, 3)]
    epochs = [stream[i : i + 7] for i in (0, 7, 14)]
    assert [sorted(e) for e in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1]


def test_order_depends_on_seed_and_step_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    def order(seed: int, steps: list[int]) -> list[list[int]]:
        prompts = Prompts(datasets.Dataset.from_list(ROWS), tokenizer, TrainConfig(seed=seed))
        return [[p.index for p in prompts.batch(step, 3)] for step in steps]

    assert order(0, [0, 1, 2, 3])[3] == order(0, [3])[0]
    assert order(0, [0, 1]) != order(1, [0, 1])


def test_long_prompts_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*ROWS, {"prompt": "1" * 40, "answer": "?"}]
    prompts = Prompts(datasets.Dataset.from_list(rows), tokenizer, TrainConfig(max_prompt_length=20))
    assert prompts.dropped == 1
    assert max(len(p.ids) for p in prompts.all) <= 20
    with pytest.raises(UsageError, match="max_prompt_length=2"):
        Prompts(datasets.Dataset.from_list(ROWS), tokenizer, TrainConfig(max_prompt_length=2))


def test_text_is_taken_as_it_is_and_chats_go_through_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": [{"role": "user", "content": "1+2="}], "answer": "3"}]
    chat = Prompts(datasets.Dataset.from_list(rows), tokenizer, TrainConfig(system_prompt="add")).all[0]
    text = str(tokenizer.decode(chat.ids))
    assert text.startswith("<|im_start|>system\nadd<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n")
    assert chat.columns == {"answer": "3"}
    plain = Prompts(datasets.Dataset.from_list(ROWS), tokenizer, TrainConfig()).all[0]
    assert tokenizer.decode(plain.ids) == "10+10="
    assert plain.text == "10+10="


def test_chats_need_a_template() -> None:
    bare = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    bare.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        Prompts(datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "1"}]}]), bare, TrainConfig())
