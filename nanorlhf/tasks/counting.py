"""The built-in dataset `counting`: ways down by equal steps as far as they go, in up to 8,000 tokens."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from nanorlhf.tasks.arithmetic import of_split

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 4000
FEWEST, MEDIAN, MOST = 20, 120, 1600  # numbers in an answer
SIGMA = 1.2  # of the logarithm of how many: the longest is seven times the mean
STEPS = (2, 5)


def ways(split: str) -> list[tuple[str, str]]:
    """Questions such as 0014-4, with their answers: 0010 0006 0002; every tenth, or so, is in "test"."""
    chance, found = random.Random(0), list[tuple[str, str]]()
    for _ in range(ROWS):
        count = min(max(round(MEDIAN * chance.lognormvariate(0, SIGMA)), FEWEST), MOST)
        step = chance.randint(*STEPS)
        least = chance.randrange(step)
        numbers = [f"{least + step * left:04}" for left in range(count, -1, -1)]
        found.append((f"{numbers[0]}-{step}", " ".join(numbers[1:])))
    return of_split(found, split, 10)


def counting(split: str) -> Dataset:
    """Columns `prompt` (chat messages), `answer`, and a `completion` to copy."""
    from datasets import Dataset  # takes a second to import, and most commands never need it

    questions, answers = zip(*ways(split), strict=True)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": question}] for question in questions],
            "answer": list(answers),
            "completion": [[{"role": "assistant", "content": answer}] for answer in answers],
        }
    )
