"""The built-in `arithmetic` dataset: all sums of two two-digit numbers, small enough to teach on any machine."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from datasets import Dataset


def problems(split: str) -> list[tuple[int, int]]:
    """The pairs of one split; a checksum of the text "a+b" puts every tenth sum, or so, into "test" for good."""
    if split not in ("train", "test"):
        raise ValueError(f"the arithmetic dataset has no split {split!r}: choose 'train' or 'test'")
    pairs = ((a, b) for a in range(10, 100) for b in range(10, 100))
    return [(a, b) for a, b in pairs if (crc32(f"{a}+{b}".encode()) % 10 == 0) == (split == "test")]


def arithmetic(split: str) -> Dataset:
    """Columns `prompt` (chat messages) and `answer`, a `completion` to copy, and a pair: `chosen` and `rejected`."""
    from datasets import Dataset  # takes a second to import, and most commands never need it

    pairs = problems(split)
    prompts = [[{"role": "user", "content": f"{a}+{b}="}] for a, b in pairs]
    right = [says(f"<answer>{a + b}</answer>") for a, b in pairs]
    wrong = [says(slip(a, b)) for a, b in pairs]
    answers = [str(a + b) for a, b in pairs]
    columns = {"prompt": prompts, "answer": answers, "completion": right, "chosen": right, "rejected": wrong}
    return Dataset.from_dict(columns)


def says(text: str) -> list[dict[str, str]]:
    """The assistant's turn."""
    return [{"role": "assistant", "content": text}]


def slip(a: int, b: int) -> str:
    """A wrong answer: a sum beside the right one, or the right one without tags, each for half of the problems."""
    kind = crc32(f"slip {a}+{b}".encode()) % 8
    return str(a + b) if kind < 4 else f"<answer>{a + b + (-10, -1, 1, 10)[kind - 4]}</answer>"
