"""The built-in datasets `arithmetic`, all sums of two two-digit numbers, and `digits`, +, - and * of two digits."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, TypeVar
from zlib import crc32

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
NEAR = (-10, -1, 1, 10)  # how far wrong answers are off


def sums(split: str) -> list[tuple[str, int]]:
    """Sums such as 47+26, with what is right; every tenth, or so, is in "test"."""
    asked = [(f"{a}+{b}", a + b) for a, b in product(range(10, 100), repeat=2)]
    return of_split(asked, split, 10)


def one_digit(split: str) -> list[tuple[str, int]]:
    """Problems such as 8-3 and 6*7, none with a result below 0; every fifth, or so, is in "test"."""
    asked = [(f"{a}{sign}{b}", do(a, b)) for sign, do in OPERATIONS.items() for a, b in product(range(10), repeat=2)]
    return of_split([(text, right) for text, right in asked if right >= 0], split, 5)


def of_split(asked: list[tuple[str, T]], split: str, every: int) -> list[tuple[str, T]]:
    """The problems of one split; a checksum of their text puts them there for good."""
    if split not in ("train", "test"):
        raise ValueError(f"the dataset has no split {split!r}: choose 'train' or 'test'")
    return [(text, right) for text, right in asked if (crc32(text.encode()) % every == 0) == (split == "test")]


def arithmetic(split: str) -> Dataset:
    """Sums, as `rows` gives them."""
    return rows(sums(split))


def digits(split: str) -> Dataset:
    """Problems of one digit, as `rows` gives them."""
    return rows(one_digit(split))


def rows(problems: list[tuple[str, int]]) -> Dataset:
    """Columns `prompt` (chat messages) and `answer`, a `completion` to copy, and a pair: `chosen` and `rejected`."""
    from datasets import Dataset  # takes a second to import, and most commands never need it

    prompts = [[{"role": "user", "content": f"{text}="}] for text, _ in problems]
    right = [says(f"<answer>{answer}</answer>") for _, answer in problems]
    wrong = [says(slip(text, answer)) for text, answer in problems]
    answers = [str(answer) for _, answer in problems]
    columns = {"prompt": prompts, "answer": answers, "completion": right, "chosen": right, "rejected": wrong}
    return Dataset.from_dict(columns)


def says(text: str) -> list[dict[str, str]]:
    """The assistant's turn."""
    return [{"role": "assistant", "content": text}]


def slip(text: str, right: int) -> str:
    """A wrong answer: a number beside the right one, or the right one without tags, each for half of the problems."""
    kind = crc32(f"slip {text}".encode()) % 8
    return str(right) if kind < 4 else f"<answer>{right + NEAR[kind - 4]}</answer>"
