"""Rows of every known form, as their datasets have them, to our columns."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.data.prompts import PromptMaker
from nanorlhf.data.row_schemas import UnfitError, content, recognised
from nanorlhf.data.row_to_prompt import RowReader
from nanorlhf.errors import UsageError
from nanorlhf.rollouts.demonstrations import demonstration, preference
from tests.samples import said, turns

GSM8K = {"question": "Natalia sold 48 clips. How many?", "answer": "She sold 48/2 = <<48/2=24>>24.\n#### 72"}
MATH = {"problem": "Simplify.", "level": "Level 5", "type": "Algebra", "solution": r"So $\boxed{\frac{1}{2}}$, or .5."}
MATH_500 = {**MATH, "answer": "1/2", "subject": "Algebra", "level": 5, "unique_id": "test/algebra/1.json"}
META = {
    "type": "GSM_Rephrased",
    "query": "What is 6 times 7?",
    "original_question": "6 times 7?",
    "response": "It is 42. #### 42 The answer is: 42",
}
HH = {
    "chosen": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nYes?\n\nHuman: Who?\n\nAssistant: Me.",
    "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nYes?\n\nHuman: Who?\n\nAssistant: Nobody",
}
COUNTDOWN = {"target": 98, "nums": [44, 19, 35]}
TLDR = {"prompt": "SUBREDDIT: r/cats\n\nPOST: A long one.\n\nTL;DR:", "completion": " Cats."}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": turns("6*7?"),
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"index": 0, "split": "train"},
}
HI = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]

# name, row, form, prompt, answer, what SFT copies, what DPO compares
KNOWN: list[tuple[str, dict[str, Any], str, Any, Any, str | None, list[str] | None]] = [
    ("gsm8k", GSM8K, "GSM8K's", GSM8K["question"], "72", GSM8K["answer"], None),
    ("question-answer", {"question": "6*7?", "answer": "42"}, "GSM8K's", "6*7?", "42", "42", None),
    ("math", MATH, "MATH's", "Simplify.", r"\frac{1}{2}", MATH["solution"], None),
    ("math-500", MATH_500, "MATH's", "Simplify.", "1/2", MATH["solution"], None),
    ("problem-answer", {"problem": "6*7?", "answer": 42}, "MATH's", "6*7?", 42, None, None),
    ("metamath", META, "MetaMathQA's", META["query"], "42", META["response"], None),
    (
        "hh",
        HH,
        "Anthropic's hh-rlhf",
        turns("Hi there", "Hello.\n\nYes?", "Who?"),
        None,
        "Me.",
        ["Me.", "Nobody"],
    ),
    ("tldr", TLDR, "our own", TLDR["prompt"], None, " Cats.", None),
    ("sharegpt", SHAREGPT, "ShareGPT's", HI, None, "Hello", None),
    ("verl", VERL, "verl's", turns("6*7?"), "42", None, None),
    ("prompt only", {"prompt": "6*7=", "answer": 42}, "our own", "6*7=", 42, None, None),
    ("prompt-completion", {"prompt": turns("a"), "completion": said("b")}, "our own", turns("a"), None, "b", None),
    ("messages", {"messages": turns("a", "b", "c", "d")}, "conversations", turns("a", "b", "c"), None, "d", None),
    ("messages, unanswered", {"messages": turns("a", "b", "c")}, "conversations", turns("a"), None, "b", None),
    ("liked", {"prompt": "a", "completion": "b", "label": True}, "our own", "a", None, "b", None),
    ("pair", {"prompt": "a", "chosen": "b", "rejected": "c"}, "our own", "a", None, "b", ["b", "c"]),
    (
        "pair of chats",
        {"prompt": turns("a"), "chosen": said("b"), "rejected": said("c")},
        "our own",
        turns("a"),
        None,
        "b",
        ["b", "c"],
    ),
    (
        "ultrafeedback",
        {"prompt": "a", "chosen": turns("a", "b"), "rejected": turns("a", "c")},
        "our own",
        turns("a"),
        None,
        "b",
        ["b", "c"],
    ),
    (
        "implicit prompt",
        {"chosen": turns("a", "b"), "rejected": turns("a", "b")},
        "preferences",
        turns("a"),
        None,
        "b",
        ["b", "b"],
    ),
    *(
        ("implicit text", {"chosen": a, "rejected": b}, "preferences", a[:n], None, a[n:], [a[n:], b[n:]])
        for a, b, n in (
            ("Q: x\nA: yes", "Q: x\nA: yeah", 7),
            ("Q: x\nA: no", "Q: x\nA: no sir", 7),
            ("Q: x\nyes", "Q: x\nno", 5),
        )
    ),
]


def in_arrow(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it comes out of a file: through Arrow."""
    return dict(datasets.Dataset.from_list([row])[0])


@pytest.mark.parametrize(
    ("row", "form", "prompt", "answer", "copied", "pair"), [k[1:] for k in KNOWN], ids=lambda v: ""
)
def test_known_forms(
    row: dict[str, Any], form: str, prompt: Any, answer: Any, copied: str | None, pair: list[str] | None
) -> None:
    row = in_arrow(row)
    reading = RowReader(TrainConfig(), row)
    assert reading.form and reading.form.name == form
    read = reading(row)
    assert read.prompt == prompt
    assert read.columns.get("answer") == answer
    assert read.columns.keys() >= row.keys() - {"prompt"}  # rewards may want any of them
    for reader, found in ((demonstration, None if copied is None else [copied]), (preference, pair)):
        if found is None:
            with pytest.raises((UsageError, UnfitError), match=r"this dataset has|without"):
                reader(read)
        else:
            assert reader(read) == found


def test_countdown_is_put_into_words() -> None:
    read = RowReader(TrainConfig(), COUNTDOWN)(COUNTDOWN)
    assert "[44, 19, 35]" in str(read.prompt) and "equals 98" in str(read.prompt)
    assert "<answer>" in str(read.prompt)
    assert read.columns == COUNTDOWN


def test_verls_ground_truth_has_both_names() -> None:
    assert RowReader(TrainConfig(), VERL)(VERL).columns["ground_truth"] == "42"
    assert RowReader(TrainConfig(), VERL)({**VERL, "reward_model": None}).columns["answer"] is None
    assert recognised({**VERL, "reward_model": "a name"}) is recognised({"prompt": ""})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": None}, "empty"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"messages": said("a")}, "empty"),
        ({"prompt": [{"role": "user", "content": None}]}, "without text"),
        ({"question": None, "answer": "1"}, "empty"),
        ({"target": 1, "nums": []}, "empty"),
        ({"chosen": "yes", "rejected": "no"}, "do not begin alike"),
    ],
)
def test_rows_with_nothing_to_ask(row: dict[str, Any], why: str) -> None:
    with pytest.raises(UnfitError, match=why):
        RowReader(TrainConfig(), row)(row)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a", "completion": None}, "without an answer"),
        ({"prompt": "a", "completion": "b", "label": False}, "without an answer"),
        ({"messages": turns("a")}, "without an answer"),
    ],
)
def test_rows_with_nothing_to_copy(row: dict[str, Any], why: str) -> None:
    with pytest.raises(UnfitError, match=why):
        demonstration(RowReader(TrainConfig(), row)(row))


def test_pairs_that_part_early_teach_nothing_but_still_ask() -> None:
    row = {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "x")}
    read = RowReader(TrainConfig(), row)(row)
    assert read.prompt == turns("a", "b", "c")
    with pytest.raises(UnfitError, match="differs before its last turn"):
        preference(read)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": 12}, "text or a list of messages is wanted, and not 12"),
        ({"prompt": ["a"]}, r"not \['a'\]"),
        ({"prompt": [{"role": "user"}, {"text": "x"}]}, "without text|a role and a content"),
        ({"prompt": [{"role": 1, "content": "x"}]}, "a role and a content, both text"),
        ({"messages": "a"}, "a conversation is a list of messages, and not 'a'"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "a role and a content"),
    ],
)
def test_rows_that_cannot_be_read(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises((UsageError, UnfitError), match=complaint):
        RowReader(TrainConfig(), row)(row)


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert content([{"role": "assistant", "content": parts}]) == "ab"
    with pytest.raises(UsageError, match="one message of the assistant's, and not"):
        content(turns("a", "b"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))


NAMES = sorted({name for _, row, *_ in KNOWN for name in row} | {"nums", "target", "label", "role"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab{}\n#\\:Human", max_size=9),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "ground_truth"]), v, max_size=3)
    ),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)


OPTIONS = [
    {},
    {"few_shot": 1},
    {"prompt_template": "{prompt} {"},
    {"answer_pattern": "(a)"},
    {"columns": {"b": "prompt"}},
]


@settings(max_examples=300, deadline=None)
@given(first=ROWS, later=st.lists(ROWS | VALUES, max_size=3), options=st.sampled_from(OPTIONS))
def test_whatever_rows_hold_a_mistake_is_said_in_one_line(
    first: dict[str, Any], later: list[Any], options: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    config, complaint = TrainConfig(**options), ""
    for reader in (None, demonstration, preference):
        try:
            maker = PromptMaker(tokenizer, config, RowReader(config, first), reader, [("a", "b")])
            made = [maker(index, row) for index, row in enumerate([first, *later])]
        except UsageError as error:
            complaint += str(error)
        else:
            assert all(prompt is None or prompt.ids for prompt in made)
    assert len(complaint.splitlines()) <= 1
