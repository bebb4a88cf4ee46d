"""Sources of rows, and what is said if they have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import datasets
import pytest

from nanorlhf.data.sources import as_rows, load
from nanorlhf.errors import UsageError

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10, 17)]
MINE = """
import datasets

def listed(split):
    return [{"prompt": split, "n": n} for n in range(4)]

def generated(split):
    yield from listed(split)

def whole(split):
    return datasets.DatasetDict({split: datasets.Dataset.from_list(listed(split))})

def stream(split):
    return datasets.IterableDataset.from_generator(generated, gen_kwargs={"split": split})

def raises(split):
    raise KeyError("no such\\nkey")

def strings(split):
    return ["a", "b"]

def nothing(split):
    return []

number = 3
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps datasets that are loaded here out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "sets.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def prompts(rows: Any) -> list[str]:
    return [row["prompt"] for row in rows]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder", "saved", "saved split"])
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
    elif kind == "saved":
        datasets.DatasetDict({"train": made}).save_to_disk(path)
    else:
        made.save_to_disk(path)
    loaded = cast(datasets.Dataset, load(str(path), None, "train"))
    assert prompts(loaded) == prompts(ROWS)
    assert [str(a) for a in loaded["answer"]] == [row["answer"] for row in ROWS]
    assert prompts(load(str(path), None, "train[2:4]")) == prompts(ROWS)[2:4]
    if not kind.startswith("saved"):
        stream = load(str(path), None, "train", streaming=True)
        assert isinstance(stream, datasets.IterableDataset)
        assert prompts(stream) == prompts(ROWS)


@pytest.mark.parametrize("name", ["listed", "generated", "whole", "stream"])
def test_functions_of_the_users_own(name: str, mine: Path) -> None:
    for spec in (f"{mine}:{name}", f"my_package.sets:{name}"):
        assert prompts(load(spec, None, "valid")) == ["valid"] * 4
        streamed = load(spec, None, "valid", streaming=True)
        assert prompts(streamed) == prompts(streamed) == ["valid"] * 4
    if name != "stream":
        assert len(prompts(load(f"{mine}:{name}", None, "valid[:50%]"))) == 2


def test_reasoning_gym_is_asked_for_its_task() -> None:
    pytest.importorskip("reasoning_gym")
    assert len(prompts(load("reasoning_gym:chain_sum", None, "train[:3]"))) == 3


def test_built_in_sets_can_be_cut() -> None:
    assert prompts(load("stories", None, "test[:2]")) == prompts(load("stories", None, "test"))[:2]


def wrong(folder: Path) -> dict[str, tuple[str, str, bool, str]]:
    """Names, splits, whether streamed, and what is said."""
    for name, text in {"empty.jsonl": "", "bad.jsonl": "no json\n", "good.jsonl": '{"prompt": "a"}\n'}.items():
        (folder / name).write_text(text)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder / "saved")
    f = str(folder)
    return {
        "no file": (f"{f}/none.jsonl", "train", False, "no such file"),
        "empty": (f"{f}/empty.jsonl", "train", False, "the file is empty"),
        "bad json": (f"{f}/bad.jsonl", "train", False, "cannot be loaded: .*JSON"),
        "wrong split": (f"{f}/good.jsonl", "tset", False, "tset"),
        "wrong part": (f"{f}/good.jsonl", "train[:x", False, "train\\[:x"),
        "no rows left": (f"{f}/good.jsonl", "train[5:]", False, "corresponds to no data"),
        "no rows of a built-in": ("stories", "test[:0]", False, "has no rows"),
        "part of a stream": (f"{f}/good.jsonl", "train[:5]", True, "a stream has no parts"),
        "wrong saved split": (f"{f}/saved", "tset", False, "there are train; none is like it"),
        "wrong built-in split": ("arithmetic", "tset", False, "no split 'tset'"),
        "part of a built-in": ("arithmetic", "train[x]", False, "train\\[x"),
        "no such function": (f"{f}/mine.py:listd", "train", False, "did you mean 'listed'"),
        "no such module": ("no_such_package.sets:f", "train", False, "cannot be imported"),
        "no such name": ("my_package.sets:listd", "train", False, "did you mean 'listed'"),
        "no function": (f"{f}/mine.py:number", "train", False, "must name a function"),
        "a function that raises": (f"{f}/mine.py:raises", "train", False, "failed on split 'train': KeyError"),
        "rows that are none": (f"{f}/mine.py:strings", "train", False, "this one does not: 'a'"),
        "no rows": (f"{f}/mine.py:nothing", "train", False, "there are no rows"),
        "part of a user's stream": (f"{f}/mine.py:stream", "train[:2]", False, "a stream has no parts"),
    }


@pytest.mark.usefixtures("mine")
def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    for case, (name, split, streaming, complaint) in wrong(tmp_path).items():
        with pytest.raises(UsageError, match=complaint) as caught:
            load(name, None, split, streaming)
        assert len(str(caught.value).splitlines()) == 1, case


def test_a_missing_hub_dataset_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="nobody/nothing"):
        load("nobody/nothing", None, "train")


def test_what_python_code_may_give() -> None:
    assert prompts(as_rows(ROWS)) == prompts(ROWS)
    with pytest.raises(UsageError, match="a Dataset, one of train, an IterableDataset or a list of rows; not DatasetD"):
        as_rows(datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}))
