"""Rows to prompts, in an order that is a function of the seed and the step alone."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, cast

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from nanorlhf.config.training import TrainConfig
from nanorlhf.data.row_schemas import Row, UnfitError, content
from nanorlhf.data.row_to_prompt import ReadRow, RowReader
from nanorlhf.data.sources import Rows, reason
from nanorlhf.data.templates import PromptFormatter
from nanorlhf.errors import UsageError, shown
from nanorlhf.system.seeds import derive
from nanorlhf.types import Prompt, Text

ANSWERS = "demonstrations"  # the column for what a reader finds
LOOK = 4096  # rows that are looked at before the run begins, all of them if there are no more
BATCH = 64  # rows read at once, which is much faster than one by one; columns of tests may have megabytes a row


class AnswerPicker(Protocol):
    """Finds the answers of a row, for algorithms that learn from them."""

    def __call__(self, read: ReadRow) -> list[str]:
        """The answers, the best first."""
        ...


class PromptMaker:
    """Rows to prompts, one at a time; counts those that give none, by reason."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        reading: RowReader,
        reader: AnswerPicker | None = None,
        examples: Sequence[tuple[Text, str]] = (),
    ) -> None:
        self.reading, self.reader, self.limit = reading, reader, config.max_prompt_length
        self.wording = PromptFormatter(tokenizer, config, bool(reading.form and reading.form.asks), examples)
        self.pattern, self.matched = config.answer_pattern, 0
        self.unfit: dict[int, str] = {}

    def __call__(self, index: int, row: Any) -> Prompt | None:
        """The row's prompt, or None if it has none that fits."""
        with self.noted(index):
            question, columns = self.contents(row)
            text, ids, prefill = self.wording(question)
            self.measure(ids)
            return Prompt(index, ids, text, columns, prefill)
        return None

    def look(self, rows: Iterable[tuple[int, Any]]) -> None:
        """Finds those of many numbered rows that have none, without making the others'."""
        asked = {}
        for index, row in rows:
            with self.noted(index):
                asked[index] = self.wording.opened(self.contents(row)[0])
        for index, ids in zip(asked, self.wording.encoded(list(asked.values())), strict=True):
            with self.noted(index):
                self.measure(ids)

    @contextlib.contextmanager
    def noted(self, index: int) -> Iterator[None]:
        """Counts a row that gives no prompt, and names one that is the user's to mend."""
        try:
            yield
        except UnfitError as unfit:
            self.unfit[index] = str(unfit)
        except UsageError as error:
            raise UsageError(f"row {index} of the dataset: {error}") from None

    def contents(self, row: Any) -> tuple[Text, dict[str, Any]]:
        """The row's question, and what rewards are given."""
        if not isinstance(row, Mapping):
            raise UsageError(f"a row maps columns to values, and this is {shown(row)}")
        read = self.reading(row)
        self.matched += read.columns.get("answer") is not None
        return read.prompt, read.columns if self.reader is None else {**read.columns, ANSWERS: self.reader(read)}

    def measure(self, ids: list[int]) -> None:
        """Refuses a prompt without tokens, or with too many."""
        if not ids:
            raise UnfitError("empty")
        if len(ids) > self.limit:
            raise UnfitError(f"longer than {self.limit} tokens")

    def why(self) -> str:
        """Says how many rows gave no prompt, and why."""
        reasons = Counter(self.unfit.values()).most_common()
        return (
            f"{len(self.unfit):,} dropped" + (": " if reasons else "") + ", ".join(f"{n:,} {why}" for why, n in reasons)
        )

    def check(self, tried: int) -> None:
        """Refuses a dataset if nothing could be used of so many rows."""
        if len(self.unfit) >= tried:
            raise UsageError(f"no prompt of the dataset can be used: of {tried:,} rows {self.why()}")
        if self.pattern is not None and not self.matched:
            raise UsageError(f"answer_pattern={self.pattern!r} finds no answer in any of {tried:,} rows")


class Prompts:
    """A dataset as prompts; batch `step` is always the same, so a resumed run goes on where it stopped.

    Rows become prompts when their turn comes. One that turns out not to fit gives its place to another, drawn by seed
    and place; those that were found before the run began have no place.
    """

    def __init__(
        self,
        dataset: Rows,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        reader: AnswerPicker | None = None,
        examples: Sequence[tuple[Text, str]] | None = None,
    ) -> None:
        self.dataset, self.seed = dataset, config.seed
        reading = RowReader(config, first_rows(dataset, 1)[0], reader is not None)
        if examples is None:
            examples = solved(dataset, reading, config)
        self.examples = examples
        self.maker = PromptMaker(tokenizer, config, reading, reader, examples)
        self.looked = self.look()

    def look(self) -> int:
        """Looks at every row, or at many, to know what there is; gives how many."""
        rows = cast(datasets.Dataset, self.dataset)
        size = len(rows)
        looked = range(size) if size <= LOOK else sorted(random.Random(0).sample(range(size), LOOK))
        batches = readable(rows.select(looked).iter(batch_size=BATCH))
        found = (dict(zip(b, row, strict=True)) for b in batches for row in zip(*b.values(), strict=True))
        self.maker.look(zip(looked, found, strict=True))
        self.maker.check(len(looked))
        self.usable = [index for index in range(size) if index not in self.maker.unfit]
        return len(looked)

    @property
    def dropped(self) -> int:
        """The number of rows that have given no prompt so far."""
        return len(self.maker.unfit)

    def summary(self) -> str:
        """A line that says how much there is."""
        size = len(self.usable) + self.dropped
        if self.looked == size:
            return f"{len(self.usable):,} prompts ({self.maker.why()})"
        return f"{size:,} rows (of {self.looked:,} looked at {self.maker.why()}; the others when their turn comes)"

    def batch(self, step: int, size: int) -> list[Prompt]:
        """The prompts of step `step`, counted from 0: consecutive places in an endless row of shuffled epochs."""
        return [self.at(place) for place in range(step * size, (step + 1) * size)]

    def beside(self, size: int, *occasion: int) -> list[Prompt]:
        """A random sample for an occasion beside the order, the same each time."""
        draw = random.Random(derive(self.seed, "beside", *occasion))
        return [self.fitting(draw.choice(self.usable), draw) for _ in range(size)]

    def held_out(self, size: int) -> list[Prompt]:
        """A fixed random sample, the same for every run, so that runs can be compared."""
        return self.sample(size, random.Random(0))

    def sample(self, size: int, draw: random.Random) -> list[Prompt]:
        """Different prompts at random, all there are if there are no more."""
        first = draw.sample(self.usable, min(size, len(self.usable)))
        kept = [prompt for index in first if (prompt := self.prompt(index))]
        if len(kept) < len(first):  # of many rows, some were not looked at before
            others = sorted(set(self.usable) - set(first))
            more = (prompt for index in draw.sample(others, len(others)) if (prompt := self.prompt(index)))
            kept += islice(more, len(first) - len(kept))
        return kept

    def at(self, place: int) -> Prompt:
        """The prompt at a place in that row."""
        epoch, offset = divmod(place, len(self.usable))
        draw = random.Random(derive(self.seed, "instead", place))
        return self.fitting(self.usable[self.order(epoch)[offset]], draw)

    def order(self, epoch: int) -> list[int]:
        """The shuffled order of an epoch; the last one asked for is kept."""
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.usable), generator=generator).tolist()
        return self._order

    def fitting(self, index: int, draw: random.Random) -> Prompt:
        """The prompt of this row, or else of another that is drawn."""
        for _ in range(LOOK):
            prompt = self.prompt(index)
            if prompt:
                return prompt
            index = draw.choice(self.usable)
        raise UsageError(f"hardly a prompt can be used: {self.maker.why()}")

    def prompt(self, index: int) -> Prompt | None:
        """The prompt of a row, if it has one that fits."""
        return self.maker(index, cast(datasets.Dataset, self.dataset)[index])


def first_rows(dataset: Rows, size: int) -> list[Row]:
    """The first rows, at least one."""
    rows = list(islice(readable(dataset), size))
    if not rows or not isinstance(rows[0], Mapping):
        raise UsageError(
            "the dataset has no rows" if not rows else f"a row maps columns to values, not {rows[0]!r:.200}"
        )
    return rows


def readable(dataset: Iterable[Any]) -> Iterator[Any]:
    """The rows, or batches of them; one that cannot be read is the user's to mend."""
    rows = iter(dataset)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise UsageError(f"the dataset cannot be read: {reason(error)}") from error
        yield row


def solved(dataset: Rows, reading: RowReader, config: TrainConfig) -> list[tuple[Text, str]]:
    """Prompts with their answers, one more than `few_shot` so that no row need be its own example."""
    if not config.few_shot:
        return []
    rows: Iterable[Any] = readable(dataset)
    if isinstance(dataset, datasets.Dataset):
        order = random.Random(derive(config.seed, "few_shot")).sample(range(len(dataset)), min(LOOK, len(dataset)))
        rows = (dataset[index] for index in order)
    examples: list[tuple[Text, str]] = []
    for row in islice(rows, LOOK):
        example = as_example(reading, row)
        if example and example[0] not in [prompt for prompt, _ in examples]:
            examples.append(example)
        if len(examples) > config.few_shot:
            return examples
    raise UsageError(f"few_shot={config.few_shot} needs {config.few_shot + 1} rows with a prompt and an answer")


def as_example(reading: RowReader, row: Any) -> tuple[Text, str] | None:
    """A row's prompt with what answers it, its completion or else its `answer`."""
    try:
        read = reading(row)
        answer = read.answers.get("completion", read.columns.get("answer"))
        return read.prompt, content(answer if isinstance(answer, str | list | None) else str(answer))
    except UnfitError:
        return None
