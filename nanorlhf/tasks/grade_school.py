"""The built-in `gsm_symbolic` dataset: GSM8K's kind of problems, made from the templates of arXiv:2410.05229."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING
from zlib import crc32

from nanorlhf.tasks.reasoning_gym import made

if TYPE_CHECKING:
    from datasets import Dataset

EACH = {"train": 30, "test": 8}  # problems of a template
HELD_OUT = 15  # templates
DRAWS = 5000


def gsm_symbolic(split: str) -> Dataset:
    """Columns `question`, `answer` (worked, the number after ####) and `template`; no template is in both splits."""
    from datasets import Dataset  # takes a second to import, and most commands never need it

    if split not in EACH:
        raise ValueError(f"the dataset has no split {split!r}: choose 'train' or 'test'")
    task = made("gsm_symbolic", {"size": DRAWS})
    generators, templates = task.generators, set(task.task_indices)  # all that are sound, in so many draws
    order = sorted(templates, key=lambda template: crc32(f"template {template}".encode()))
    chosen = order[:HELD_OUT] if split == "test" else order[HELD_OUT:]
    return Dataset.from_list([row for template in chosen for row in problems(generators[template], template, split)])


def problems(generator: object, template: int, split: str) -> list[dict[str, object]]:
    """Different problems of one template, or all that chance finds."""
    found: dict[str, dict[str, object]] = {}
    for number in range(10 * EACH[split]):
        entry = generator(Random(f"{template}/{number}"), 1.0)  # type: ignore[operator]
        row = {"question": entry["question"], "answer": entry["metadata"]["answer_cot"], "template": template}
        found.setdefault(entry["question"], row)
        if len(found) == EACH[split]:
            break
    return list(found.values())
