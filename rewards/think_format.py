"""1 for a completion that thinks first and then answers, each in its tags and nothing outside them, else 0."""

from __future__ import annotations

import re
from typing import Any

from nanorlhf.data.answers import text_of

TAG = re.compile(r"</?(?:think|answer)>")
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def think_format(completions: list[Any], *, answer_tags: bool = True, **_: Any) -> list[float]:
    """Whether the form is kept; without `answer_tags`, any text may follow the thought.

    Each tag stands once, in order, and what it holds is not blank. Tags that the chat template has opened already are
    part of the completion that a reward sees.
    """
    return [float(well_formed(text_of(completion), answer_tags)) for completion in completions]


def well_formed(text: str, answer_tags: bool) -> bool:
    """Whether the tags are those that must be there, and the parts between them blank where they must be."""
    wanted = TAGS if answer_tags else TAGS[:2]
    found = [tag for tag in TAG.findall(text) if tag in wanted]
    blank = [not part.strip() for part in re.split("|".join(wanted), text)]
    return found == wanted and blank == ([True, False, True, False, True] if answer_tags else [True, False, False])
