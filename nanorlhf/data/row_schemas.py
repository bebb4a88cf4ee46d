"""Rows of every known form to our columns: prompt, answer, and what there is to copy or to prefer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanorlhf.data.answers import after, last_boxed
from nanorlhf.errors import UsageError, shown
from nanorlhf.types import Text

Row = Mapping[str, Any]
Messages = list[dict[str, str]]

SPEAKERS = {"human": "user", "gpt": "assistant"}  # what ShareGPT calls them
COUNTDOWN = (
    "Using each of the numbers {nums} exactly once, and the operations +, -, * and /, write an expression that equals "
    "{target}. Think first, between <think> and </think>, then give the expression alone between <answer> and "
    "</answer>, as in <answer>(1 + 2) / 3</answer>."
)


class UnfitError(ValueError):
    """A row that there is nothing to learn from; the reason is said once, with how many there were."""


@dataclass(frozen=True)
class Form:
    """A kind of rows: how to know it by a row, and how to read one."""

    name: str
    fits: Callable[[Row], bool]
    read: Callable[[Row], dict[str, Any]]  # our columns: prompt, and answer, completion, chosen and rejected if any
    asks: bool = False  # its prompts are bare questions, which a chat model is asked as the user's message

    @property
    def foreign(self) -> bool:
        """Whether its columns have other names than ours."""
        return self.read is not own


def recognised(row: Row) -> Form | None:
    """The first known form that fits."""
    return next((form for form in FORMS if form.fits(row)), None)


def has(*columns: str) -> Callable[[Row], bool]:
    """Fits rows with all of these columns."""
    return lambda row: set(columns) <= row.keys()


def own(row: Row) -> dict[str, Any]:
    """Rows whose columns are ours already, as TRL names them: prompt, completion, chosen, rejected, label."""
    known = {name: row[name] for name in ("prompt", "completion", "chosen", "rejected") if name in row}
    if {"chosen", "rejected"} <= known.keys():
        alone = is_answer(row["chosen"]) and is_answer(row["rejected"])
        known |= {} if "prompt" in row and alone else pair(row["chosen"], row["rejected"])
    if row.get("label") is False:
        known["completion"] = None  # a completion that was disliked is none to copy
    return known


def is_answer(value: Any) -> bool:
    """Whether it is one answer, not a whole conversation."""
    return not isinstance(value, list) or len(value) == 1


def pair(chosen: Any, rejected: Any) -> dict[str, Any]:
    """A preference without a prompt, which is what both begin with: all turns but the last, or whole words."""
    chosen, rejected = words(chosen), words(rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        common = agreement(chosen, rejected)
        common = len(re.sub(r" ?\w*\Z", "", chosen[:common]))  # words stay whole, and a space belongs to what follows
        if not common:
            raise UnfitError("with a chosen and a rejected text that do not begin alike")
        return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}
    better, worse = conversation(chosen), conversation(rejected)
    same = better["prompt"] == worse["prompt"]
    return {
        "prompt": better["prompt"],
        "chosen": better["completion"],
        "rejected": worse["completion"] if same else None,
    }


def agreement(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of characters (or of tokens) that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def conversation(value: Any) -> dict[str, Any]:
    """A conversation, cut at the assistant's last turn: what comes before it is the prompt."""
    messages = words(value)
    if isinstance(messages, str):
        raise UsageError(f"a conversation is a list of messages, and not {shown(messages)}")
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        return {"prompt": messages, "completion": None}
    return {"prompt": messages[:last], "completion": messages[last : last + 1]}


def words(value: Any) -> Text:
    """Text, or messages with a role and a content each, whichever way they are spelled."""
    if value is None or value in ("", []):
        raise UnfitError("empty")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise UsageError(f"text or a list of messages is wanted, and not {shown(value)}")
    return [message(each) for each in value]


def message(turn: Row) -> dict[str, str]:
    """One message: role and content, or from and value, or content in parts of text."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if content is None:
        raise UnfitError("with a message without text")
    if not (isinstance(role, str) and isinstance(content, str)):
        raise UsageError(f"a message has a role and a content, both text, and this one is {shown(turn)}")
    return {"role": SPEAKERS.get(role, role), "content": content}


def content(answer: Any) -> str:
    """The text of an answer, which is plain or one message of the assistant's."""
    if answer is None:
        raise UnfitError("without an answer")
    answer = words(answer) if answer != "" else ""
    if isinstance(answer, str):
        return answer
    if [m["role"] for m in answer] != ["assistant"]:
        raise UsageError(f"an answer is text or one message of the assistant's, and not {shown(answer)}")
    return answer[0]["content"]


def is_transcript(value: Any) -> bool:
    """Whether this is a dialogue as Anthropic/hh-rlhf writes it."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def transcript(text: Any) -> Messages:
    """The messages of such a dialogue."""
    _, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", content(text))
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": said.strip()} for speaker, said in turns]


def maths(row: Row) -> dict[str, Any]:
    """MATH: the answer lies in the solution's last box, if no column has it."""
    solution = row.get("solution")
    answer = row["answer"] if "answer" in row else last_boxed(solution) if isinstance(solution, str) else None
    return {"prompt": row["problem"], "completion": solution, "answer": answer}


def countdown(row: Row) -> dict[str, Any]:
    """A task in words; the reward reads `target` and `nums` themselves."""
    if row["target"] is None or not row["nums"]:
        raise UnfitError("empty")
    return {"prompt": COUNTDOWN.format(nums=row["nums"], target=row["target"])}


def verl(row: Row) -> dict[str, Any]:
    """The `ground_truth` that verl's rule rewards compare with, under that name and as the answer."""
    truth = as_mapping(row["reward_model"]).get("ground_truth")
    return {**own(row), "ground_truth": truth, "answer": row.get("answer", truth)}


def grade_school(row: Row) -> dict[str, Any]:
    """GSM8K: the answer stands behind ####; if there is no such mark, it is the answer as it is."""
    said = row["answer"]
    short = after("####", said)
    return {"prompt": row["question"], "completion": said, "answer": said if short is None else short}


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping if it is none."""
    return value if isinstance(value, Mapping) else {}


FORMS = (
    Form("verl's", lambda r: "prompt" in r and "ground_truth" in as_mapping(r.get("reward_model")), verl),
    Form("our own", has("prompt"), own),
    Form(
        "Anthropic's hh-rlhf",
        lambda r: is_transcript(r.get("chosen")) and is_transcript(r.get("rejected")),
        lambda r: pair(transcript(r["chosen"]), transcript(r["rejected"])),
    ),
    Form("preferences", has("chosen", "rejected"), own),
    Form("conversations", has("messages"), lambda r: conversation(r["messages"])),
    Form("ShareGPT's", has("conversations"), lambda r: conversation(r["conversations"])),
    Form("GSM8K's", has("question", "answer"), grade_school, asks=True),
    Form("MATH's", lambda r: "problem" in r and bool({"solution", "answer"} & r.keys()), maths, asks=True),
    Form(
        "MetaMathQA's",
        has("query", "response"),
        lambda r: {"prompt": r["query"], "completion": r["response"], "answer": after("The answer is:", r["response"])},
        asks=True,
    ),
    Form("countdown's", has("target", "nums"), countdown, asks=True),
)
