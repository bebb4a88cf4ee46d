"""The score that a task of Reasoning Gym gives an answer: 1 if it is right, in some tasks a part if it nearly is.

Column: `entry`, the task's entry as JSON, as `dataset_name: reasoning_gym:TASK` has it. The answer is what the last
<answer> tags hold, or else the whole text. Four scorers run an answer as Python code and five parse it as a formula by
running it too; here the first read nothing but literals, and the others see only what is a formula of reasonable size.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from nanorlhf.data.answers import last_tagged, text_of
from nanorlhf.rewards._latex import is_modest
from nanorlhf.tasks.reasoning_gym import scorer

LITERALS = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}  # would call eval on an answer
FORMULAS = {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
GRIDS = {"arc_agi", "rearc"}  # compare with tuples, which JSON has not
FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "exp",
    "log",
    "ln",
    "sqrt",
    "abs",
    "pi",
}
FORMULA = re.compile(r"[\w\s+\-*/^().,=]*")
NAME = re.compile(r"\.?\s*[^\W\d]\w*")


def reasoning(completions: list[Any], entry: list[Any], *, need_tags: bool = False, **_: Any) -> list[float | None]:
    """The task's score; `need_tags`: an answer without tags is none."""
    return [
        None
        if one is None
        else judged(text_of(completion), one if isinstance(one, dict) else json.loads(one), need_tags)
        for completion, one in zip(completions, entry, strict=True)
    ]


def judged(text: str, entry: dict[str, Any], need_tags: bool) -> float:
    """The score of one completion."""
    tagged = last_tagged(text)
    if tagged is None and need_tags:
        return 0.0
    answer, task = text.strip() if tagged is None else tagged, entry["metadata"]["source_dataset"]
    if task in FORMULAS and not is_formula(answer):
        answer = ""
    score = judge(task, json.dumps(entry.get("options", {})))
    try:
        return float(score(answer=answer, entry=restored(task, entry)))
    except Exception:  # noqa: BLE001  some scorers raise, in many ways, on an answer that has not their form
        return 0.0


def judge(task: str, options: str) -> Callable[..., float]:
    """The task's scorer; if it would run answers as code, it finds a harmless `eval` instead."""
    score = scorer(task, options)
    if task in LITERALS:
        vars(sys.modules[score.__module__])["eval"] = ast.literal_eval
    return score


def is_formula(answer: str) -> bool:
    """Whether these are numbers, variables and known functions, nothing else is called, and it can be worked out."""
    names = [name.strip() for name in NAME.findall(answer)]
    known = all(name in FUNCTIONS or (len(name) == 1 and name not in "NOQS") for name in names)
    return known and FORMULA.fullmatch(answer) is not None and is_modest(answer)


def restored(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry as it was before it became JSON."""
    if task not in GRIDS:
        return entry
    grid = tuple(map(tuple, entry["metadata"]["output"]))
    return {**entry, "metadata": {**entry["metadata"], "output": grid}}
