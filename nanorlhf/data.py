"""Dataset rows to prompts, in an order that is a function of the seed and the step alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from nanorlhf.arithmetic import arithmetic
from nanorlhf.errors import UsageError, nearest
from nanorlhf.options import TrainConfig
from nanorlhf.seeds import derive
from nanorlhf.stories import stories
from nanorlhf.types import Prompt, Text

BUILT_IN = {"arithmetic": arithmetic, "stories": stories}
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load(name: str, config: str | None, split: str) -> datasets.Dataset:
    """A built-in dataset, a local file or folder, or one from the hub."""
    path = Path(name)
    try:
        if name in BUILT_IN:
            return BUILT_IN[name](split)
        if path.suffix in READERS:
            if not path.is_file():
                raise UsageError(f"dataset_name={name!r}: there is no such file")
            loaded = datasets.load_dataset(READERS[path.suffix], data_files=name, split=split)
        elif path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            saved = datasets.load_from_disk(name)
            loaded = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            loaded = datasets.load_dataset(name, config, split=split)
    except UsageError:
        raise
    except Exception as error:  # datasets raises dozens of types, all of them "cannot load this"
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"dataset_name={name!r}, split {split!r}, cannot be loaded: {why}") from error
    return cast(datasets.Dataset, loaded)


def require_column(dataset: datasets.Dataset, column: str, option: str) -> None:
    """Refuses a dataset that lacks a column something needs."""
    if column not in dataset.column_names:
        names = dataset.column_names
        there = f"the dataset has {', '.join(names)}; {nearest(column, names)}"
        raise UsageError(f"{option} needs the column {column!r}, and {there}")


class Prompts:
    """A dataset as prompts; batch `step` is always the same, so a resumed run goes on where it stopped."""

    def __init__(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> None:
        require_column(dataset, config.prompt_column, "prompt_column")
        self.seed = config.seed
        self.all: list[Prompt] = []
        for index, row in enumerate(cast(Iterable[dict[str, Any]], dataset)):
            text, ids = as_prompt(row[config.prompt_column], tokenizer, config.system_prompt)
            if 0 < len(ids) <= config.max_prompt_length:
                columns = {name: value for name, value in row.items() if name != config.prompt_column}
                self.all.append(Prompt(index, ids, text, columns))
        self.dropped = len(dataset) - len(self.all)
        if not self.all:
            raise UsageError(
                f"no prompt of the dataset has a token and fits max_prompt_length={config.max_prompt_length}"
            )

    def batch(self, step: int, size: int) -> list[Prompt]:
        """The prompts of step `step`, counted from 0: consecutive places in an endless row of shuffled epochs."""
        return [self.at(place) for place in range(step * size, (step + 1) * size)]

    def beside(self, size: int, *occasion: int) -> list[Prompt]:
        """A random sample for an occasion beside the order, the same each time."""
        draw = random.Random(derive(self.seed, "beside", *occasion))
        return [draw.choice(self.all) for _ in range(size)]

    def held_out(self, size: int) -> list[Prompt]:
        """A fixed random sample, the same for every run, so that runs can be compared."""
        return random.Random(0).sample(self.all, min(size, len(self.all)))

    def at(self, place: int) -> Prompt:
        """The prompt at a place in that row."""
        epoch, offset = divmod(place, len(self.all))
        return self.all[self.order(epoch)[offset]]

    def order(self, epoch: int) -> list[int]:
        """The shuffled order of an epoch; the last one asked for is kept."""
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.all), generator=generator).tolist()
        return self._order


def as_prompt(value: Any, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> tuple[Text, list[int]]:
    """The prompt as rewards see it, and its tokens: messages go through the chat template, text is taken as it is."""
    if isinstance(value, str):
        return value, list(tokenizer(value)["input_ids"])
    messages = [{"role": m["role"], "content": m["content"]} for m in value]
    if system_prompt:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if not tokenizer.chat_template:
        raise UsageError(
            f"the prompts are chat messages, and the tokenizer has no chat template: {json.dumps(messages)[:200]}"
        )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return messages, cast(list[int], ids)
