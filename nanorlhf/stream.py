"""Rows that come one after the other, too many to keep: prompts in an order that repeats, and resumes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase

from nanorlhf.data import LOOK, Prompts, Reader, readable
from nanorlhf.errors import UsageError
from nanorlhf.options import TrainConfig
from nanorlhf.seeds import derive
from nanorlhf.sources import Rows
from nanorlhf.types import Prompt, Text

BUFFER = 10_000  # rows among which the next is drawn


class Stream(Prompts):
    """Prompts of rows that come one after the other, shuffled within a buffer; a resumed run reads them again."""

    def look(self) -> int:
        """Makes sure that there is a prompt near the beginning."""
        self.held_out(1)
        self.rewind()
        return LOOK

    def summary(self) -> str:
        """What there is is not known before it is read."""
        return f"prompts from a stream ({self.maker.why()} so far)"

    def rewind(self) -> None:
        """Back to the first prompt."""
        self.buffer: list[tuple[int, Any]] = []
        self.window: deque[Prompt] = deque()
        self.start = 0  # place of the window's first prompt
        self.coming = self.kept(self.shuffled())

    def batch(self, step: int, size: int) -> list[Prompt]:
        first = step * size
        if first < self.start:
            self.rewind()
        while self.start + len(self.window) < first + size:
            self.window.append(next(self.coming))
            while self.window and self.start < first:
                self.window.popleft()
                self.start += 1
        while self.start < first:
            self.window.popleft()
            self.start += 1
        return list(islice(self.window, size))

    def beside(self, size: int, *occasion: int) -> list[Prompt]:
        """A random sample of the rows to come, the same each time after the same step's batch."""
        draw = random.Random(derive(self.seed, "beside", *occasion))
        if not self.buffer:
            return [draw.choice(self.window) for _ in range(size)]
        return list(islice(self.kept(draw.choice(self.buffer) for _ in count()), size))

    def held_out(self, size: int) -> list[Prompt]:
        """The first prompts there are, the same for every run."""
        return list(islice(self.kept(enumerate(readable(self.dataset))), size))

    def sample(self, size: int, draw: random.Random) -> list[Prompt]:
        """The run's own first prompts."""
        return self.batch(0, size)

    def kept(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Prompt]:
        """The prompts of these rows, as long as one comes now and then."""
        vain = 0
        for index, row in rows:
            prompt = self.maker(index, row)
            vain = 0 if prompt else vain + 1
            if vain == LOOK:
                raise UsageError(f"hardly a prompt can be used: {self.maker.why()}")
            if prompt:
                yield prompt

    def shuffled(self) -> Iterator[tuple[int, Any]]:
        """Numbered rows without end, epoch after epoch: parts of the dataset shuffled, rows within the buffer."""
        number = count()
        for epoch in count():
            seed = derive(self.seed, "epoch", epoch)
            draw = random.Random(seed)
            rows = cast(datasets.IterableDataset, self.dataset).shuffle(seed=seed, buffer_size=1)
            for row in readable(rows):
                self.buffer.append((next(number), row))
                if len(self.buffer) > BUFFER:
                    yield self.buffer.pop(draw.randrange(len(self.buffer)))
            draw.shuffle(self.buffer)
            while self.buffer:
                yield self.buffer.pop()


def prompts_of(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    reader: Reader | None = None,
    examples: Sequence[tuple[Text, str]] | None = None,
) -> Prompts:
    """The prompts of a dataset of either kind."""
    kind = Prompts if isinstance(dataset, datasets.Dataset) else Stream
    return kind(dataset, tokenizer, config, reader, examples)
