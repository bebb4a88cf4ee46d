"""Reads a dataset's rows: columns named, the form recognised, the answer taken out, the prompt worded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanorlhf.config.training import TrainConfig
from nanorlhf.data.answers import after, last_boxed, last_number_text
from nanorlhf.data.row_schemas import Row, UnfitError, recognised, words
from nanorlhf.errors import UsageError, nearest
from nanorlhf.types import Text

READY: dict[str, Callable[[str], str | None]] = {
    "gsm8k": partial(after, "####"),
    "boxed": last_boxed,
    "last_number": last_number_text,
}
LEARNED = ("completion", "chosen", "rejected")  # what a row may hold to copy or to prefer
FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class ReadRow:
    """The contents of a row: the prompt, what rewards are given, and what there is to copy or to prefer."""

    prompt: Text
    columns: dict[str, Any]
    answers: dict[str, Any]  # completion, chosen and rejected, if there are any
    names: list[str]  # of all its columns


def require(column: str, names: Collection[str], option: str, otherwise: str = "") -> None:
    """Refuses a dataset that lacks a column something needs."""
    if column not in names:
        there = f"the dataset has {', '.join(names)}; {nearest(column, names, listed=True)}"
        raise UsageError(f"{option} needs the column {column!r}, and {there}{otherwise}")


class RowReader:
    """Rows to what they held; made for one dataset after one of its rows, and for who `learns` its answers or not."""

    def __init__(self, config: TrainConfig, row: Row, learns: bool = False) -> None:
        self.template, self.names = config.prompt_template, list(row)
        self.renames = config.columns
        for column in self.renames.values():
            require(column, self.names, "columns")
        named = self.named(row)
        hidden = {"prompt"} if learns and self.begins_a_chat(named) else set[str]()
        self.form = recognised({name: value for name, value in named.items() if name not in hidden})
        if self.form is None and self.template is None:
            require("prompt", named, "a prompt", "; name yours in columns, or make prompts with prompt_template")
        self.extract = None if config.answer_pattern is None else extractor(config.answer_pattern)
        for field in self.fields():
            require(
                field,
                [*named, *(["prompt"] if self.form else [])],
                "prompt_template",
                " (a brace of its own is written twice)",
            )

    def begins_a_chat(self, row: Row) -> bool:
        """Whether a column `prompt` that nobody named only repeats how a chat begins, whose last turn is the answer."""
        return "messages" in row and "prompt" not in self.renames and not any(name in row for name in LEARNED)

    def fields(self) -> list[str]:
        """The columns that the template names."""
        return [field for field in FIELD.findall(self.template or "") if field]

    def named(self, row: Row) -> dict[str, Any]:
        """A row with its columns under all their names; what it lacks is None."""
        full = {**dict.fromkeys(self.names), **row}
        return {**full, **{ours: full[theirs] for ours, theirs in self.renames.items()}}

    def __call__(self, row: Row) -> ReadRow:
        """The contents of this row; UnfitError if there are none."""
        row = self.named(row)
        known = self.form.read(row) if self.form else {}
        columns = {name: value for name, value in row.items() if name != "prompt"}
        columns |= {name: known[name] for name in ("answer", "ground_truth") if name in known}
        if self.extract:
            columns["answer"] = self.extract(row["answer"] if "answer" in row else known.get("answer"))
        answers = {name: known[name] for name in LEARNED if name in known}
        return ReadRow(self.worded(row, known.get("prompt")), columns, answers, list(row))

    def worded(self, row: Row, prompt: Any) -> Text:
        """The prompt as the template words it; of a conversation, its last turn."""
        if self.template is None or "prompt" in self.fields():
            prompt = words(prompt)
        if self.template is None:
            return prompt
        if isinstance(prompt, list) and "prompt" in self.fields():
            *before, last = prompt
            return [*before, {**last, "content": filled(self.template, {**row, "prompt": last["content"]})}]
        return filled(self.template, {**row, "prompt": prompt})


def filled(template: str, values: Mapping[str, Any]) -> str:
    """The template with its {names} replaced; other braces stay, and {{ and }} are one brace each."""

    def one(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        if values[found[1]] is None:
            raise UnfitError(f"with an empty column {found[1]!r}")
        return str(values[found[1]])

    return FIELD.sub(one, template)


def extractor(pattern: str) -> Callable[[Any], str | None]:
    """Takes the answer out of a text: by a ready name, or what the group holds where the pattern matches last."""
    read = READY.get(pattern) or last_match(pattern)
    return lambda text: read(text) if isinstance(text, str) else None


def last_match(pattern: str) -> Callable[[str], str | None]:
    """Finds what the group of a regular expression holds where it matches last."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"answer_pattern={pattern!r} is no regular expression: {error}") from None
    if compiled.groups != 1:
        known = f"ready are {', '.join(READY)}; {nearest(pattern, READY, listed=True)}"
        raise UsageError(f"answer_pattern={pattern!r} has {compiled.groups} groups and takes one; {known}")

    def read(text: str) -> str | None:
        found = compiled.findall(text)
        return found[-1].strip() if found else None

    return read
