"""Rows that come one after the other, too many to keep: prompts in an order that repeats, and resumes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase

from nanorlhf.config.training import TrainConfig
from nanorlhf.data.prompts import LOOK, AnswerPicker, Prompts, readable
from nanorlhf.data.sources import Rows
from nanorlhf.errors import UsageError
from nanorlhf.system.seeds import derive
from nanorlhf.types import Prompt, Text

Numbered = tuple[int, Any]  # a row, and how many came before it
BUFFER = 10_000  # rows among which the next is drawn


class Stream(Prompts):
    """Prompts of rows that come one after the other, shuffled within a buffer; a resumed run passes over what it had.

    As elsewhere a row that does not fit gives its place to another, here one of those to come, so that places count
    rows, and passing over them takes no more than reading them.
    """

    def look(self) -> int:
        """Makes sure that there is a prompt near the beginning."""
        self.held_out(1)
        self.rewind()
        return LOOK

    def summary(self) -> str:
        """A line without a total, which is not known before all rows are read."""
        return f"prompts from a stream ({self.maker.why()} so far)"

    def rewind(self) -> None:
        """Back to the first row."""
        self.buffer: list[Numbered] = []
        self.window: deque[Numbered] = deque()
        self.start = 0  # place of the window's first row
        self.coming = self.shuffled()

    def batch(self, step: int, size: int) -> list[Prompt]:
        """The prompts of step `step`, counted from 0."""
        first = step * size
        if first < self.start:
            self.rewind()
        for _ in range(first - self.start):
            if self.window:
                self.window.popleft()
            else:
                next(self.coming)
        self.start = first
        while len(self.window) < size:
            self.window.append(next(self.coming))
        rows = enumerate(islice(self.window, size), first)
        return [self.taken(row, random.Random(derive(self.seed, "instead", place))) for place, row in rows]

    def beside(self, size: int, *occasion: int) -> list[Prompt]:
        """A random sample of the rows to come, the same each time after the same step's batch."""
        draw = random.Random(derive(self.seed, "beside", *occasion))
        return [self.taken(draw.choice(self.buffer or self.window), draw) for _ in range(size)]

    def taken(self, row: Numbered, draw: random.Random) -> Prompt:
        """The prompt of this row, or else of another that is drawn."""
        for _ in range(LOOK):
            prompt = self.maker(*row)
            if prompt:
                return prompt
            row = draw.choice(self.buffer or self.window)
        raise UsageError(f"hardly a prompt can be used: {self.maker.why()}")

    def held_out(self, size: int) -> list[Prompt]:
        """The first prompts there are, the same for every run."""
        found: list[Prompt] = []
        for number, row in enumerate(readable(self.dataset)):
            prompt = self.maker(number, row)
            found += [prompt] if prompt else []
            if len(found) == size:
                break
            if number + 1 == LOOK and not found:
                raise UsageError(f"hardly a prompt can be used: {self.maker.why()}")
        if not found:
            self.maker.check(0)
        return found

    def sample(self, size: int, draw: random.Random) -> list[Prompt]:
        """The run's own first prompts."""
        first = self.batch(0, size)
        self.rewind()  # or the rows read ahead would be among those that replace others
        return first

    def shuffled(self) -> Iterator[Numbered]:
        """Numbered rows without end, epoch after epoch: parts of the dataset shuffled, rows within the buffer."""
        read = 0
        for epoch in count():
            before = read
            seed = derive(self.seed, "epoch", epoch)
            draw = random.Random(seed)
            rows = cast(datasets.IterableDataset, self.dataset).shuffle(seed=seed, buffer_size=1)
            for row in readable(rows):
                self.buffer.append((read, row))
                read += 1
                if len(self.buffer) > BUFFER:
                    yield self.buffer.pop(draw.randrange(len(self.buffer)))
            if read == before:
                raise UsageError(f"the stream gives rows only once, and there were {read:,}")
            draw.shuffle(self.buffer)
            while self.buffer:
                yield self.buffer.pop()


def prompts_of(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    reader: AnswerPicker | None = None,
    examples: Sequence[tuple[Text, str]] | None = None,
) -> Prompts:
    """The prompts of a dataset of either kind."""
    kind = Prompts if isinstance(dataset, datasets.Dataset) else Stream
    return kind(dataset, tokenizer, config, reader, examples)
