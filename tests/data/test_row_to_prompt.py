"""Options that say how rows are read: columns, answers, templates."""

from __future__ import annotations

from typing import Any

import pytest

from nanorlhf.config.training import TrainConfig
from nanorlhf.data.row_schemas import UnfitError
from nanorlhf.data.row_to_prompt import ReadRow, RowReader, filled
from nanorlhf.errors import UsageError
from nanorlhf.rollouts.demonstrations import demonstration
from tests.samples import turns

SUM = {"question": "6*7?", "answer": "It is easy.\n#### 42", "nums": [6, 7]}


def read(row: dict[str, Any], **options: Any) -> ReadRow:
    return RowReader(TrainConfig(**options), row)(row)


def test_columns_have_more_than_one_name() -> None:
    found = read({"text": "6*7=", "final": "42"}, columns={"prompt": "text", "answer": "final", "target": "final"})
    assert found.prompt == "6*7="
    assert found.columns == {"text": "6*7=", "final": "42", "answer": "42", "target": "42"}
    assert read({**SUM, "short": "42"}, columns={"answer": "short"}).columns["answer"] == "42"


def test_a_prompt_that_is_named_is_taken_as_it_is_and_turns_recognition_off() -> None:
    found = read(SUM, columns={"prompt": "question"})
    assert found.prompt == "6*7?"
    assert found.columns == SUM
    assert found.answers == {}
    assert read({"q": "a", "completion": "b"}, columns={"prompt": "q"}).answers == {"completion": "b"}
    assert read({"prompt": "a", "q": "b"}, columns={"prompt": "q"}).prompt == "b"
    assert read(SUM, prompt_column="question") == found, "as other trainers call it"


def test_a_chat_with_its_first_turn_beside_it_is_learned_from_and_asked_by_its_prompt() -> None:
    """As ultrachat_200k and no_robots have it."""
    row = {"prompt": "1+1=", "messages": [*turns("1+1="), {"role": "assistant", "content": "2"}]}
    learned = RowReader(TrainConfig(), row, learns=True)(row)
    assert (learned.prompt, demonstration(learned)) == (turns("1+1="), ["2"])
    assert read(row).prompt == "1+1="
    for other in (row | {"completion": "3"}, row | {"chosen": "3", "rejected": "4"}):
        assert RowReader(TrainConfig(), other, learns=True)(other).prompt == "1+1="
    named = TrainConfig(columns={"prompt": "q"})
    assert RowReader(named, row | {"q": "2+2="}, learns=True)(row | {"q": "2+2="}).prompt == "2+2="


@pytest.mark.parametrize(
    ("pattern", "answer", "found"),
    [
        ("gsm8k", "6*7 #### 42\n", "42"),
        ("gsm8k", "42", None),
        ("boxed", r"so \boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("last_number", "1 or 2,000", "2000"),
        (r"= (\d+)", "1+1= 2, 2+2= 4.", "4"),
        (r"(\d+)", 42, None),
        (r"(\d+)", None, None),
    ],
)
def test_the_answer_is_taken_out(pattern: str, answer: Any, found: str | None) -> None:
    assert read({"prompt": "a", "answer": answer}, answer_pattern=pattern).columns["answer"] == found


def test_a_pattern_reads_the_column_itself_or_else_what_the_form_found() -> None:
    row = {"problem": "a", "solution": r"\boxed{x = 7}"}
    assert read(row, answer_pattern=r"(\d+)").columns["answer"] == "7"
    assert read(SUM, answer_pattern="^(It)").columns["answer"] == "It"


def test_templates() -> None:
    assert read(SUM, prompt_template="Q: {question}\n").prompt == "Q: 6*7?\n"
    assert read(SUM, prompt_template="{prompt} Use {nums}.").prompt == "6*7? Use [6, 7]."
    assert read({"a": "x", "b": "y"}, prompt_template="{b}{a}").prompt == "yx"
    assert read({"prompt": turns("a", "b", "c")}, prompt_template="<{prompt}>").prompt == turns("a", "b", "<c>")
    assert read({"prompt": turns("a"), "b": "y"}, prompt_template="{b}").prompt == "y"
    with pytest.raises(UnfitError, match="empty column 'a'"):
        read({"a": None}, prompt_template="{a}")


def test_braces_are_safe() -> None:
    values = {"a": "{b} {}", "b": "no"}
    assert filled(r"{a} \boxed{} {{b}} { } {1} {a", values) == r"{b} {} \boxed{} {b} { } {1} {a"
    assert filled('{"a": {a}}', {"a": 1}) == '{"a": 1}'


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {},
            "a prompt needs the column 'prompt', and the dataset has text, final; none is like it; name .* in columns,",
        ),
        ({"prompt_column": "txt"}, "columns needs the column 'txt', and .* did you mean 'text'"),
        ({"columns": {"prompt": "text", "answer": "finl"}}, "columns needs the column 'finl'.* did you mean 'final'"),
        ({"prompt_template": "{txt}"}, "prompt_template needs the column 'txt'.* did you mean 'text'.* written twice"),
        ({"prompt_template": "{prompt}"}, "prompt_template needs the column 'prompt'"),
        (
            {"columns": {"prompt": "text"}, "answer_pattern": "boxd"},
            "has 0 groups and takes one; ready are .*did you mean 'boxed'",
        ),
        ({"columns": {"prompt": "text"}, "answer_pattern": "(a)(b)"}, "has 2 groups"),
        ({"columns": {"prompt": "text"}, "answer_pattern": "(a"}, "no regular expression"),
    ],
)
def test_mistakes(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        read({"text": "a", "final": "b"}, **options)
    assert len(str(caught.value).splitlines()) == 1
