r"""Finding answers: the last tags, the last balanced \boxed{}, the last number."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data.answers import boxes, last_boxed, last_number, last_number_text, last_tagged, text_of


def test_text_of_both_kinds() -> None:
    assert text_of("a") == text_of([{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]) == "a"


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("<answer> 2\n </answer>.", "2"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer>2</answer> and <answer>3", "2"),
        ("<answer>2</answer></answer>", "2"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer></answer>", ""),
        ("</answer>2<answer>", None),
        ("<answer>2", None),
        ("2</answer>", None),
        ("<Answer>2</Answer>", None),
        ("", None),
    ],
)
def test_last_tags(text: str, held: str | None) -> None:
    assert last_tagged(text) == held


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"so \boxed{ 12 }.", "12"),
        (r"\boxed{1} or \fbox{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {3}", "3"),
        (r"\\boxed{3}", "3"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{1 \boxed{2}", "2"),
        (r"} { \boxed{4}", "4"),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{\text{a \} b} + {2}}.", r"\text{a \} b} + {2}"),
        (r"\boxed 5", None),
        (r"\boxed{5", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_last_box(text: str, held: str | None) -> None:
    assert last_boxed(text) == held


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("It is 42.", 42),
        ("from 3 to 42 apples", 42),
        ("1,234,567.50 dollars", Fraction("1234567.5")),
        ("-$5", -5),
        ("$-5", -5),
        (r"\$5", 5),
        ("€1,000", 1000),
        ("\u22125", -5),
        ("\u20135", -5),
        ("10-5", 5),
        ("10 - 5", 5),
        ("x=-5", -5),
        ("(3)-5", 5),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("$1/0", None),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{ 3 }{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\frac{3}{-4}", Fraction(-3, 4)),
        (r"\frac34", Fraction(3, 4)),
        (r"10,\!000 and 10\,000", 10000),
        ("10{,}000", 10000),
        ("1.5e3", 1500),
        ("2E-2", Fraction(1, 50)),
        (".5", Fraction(1, 2)),
        ("0005", 5),
        ("12,34", 34),
        ("version 1.2.3", Fraction("1.2")),
        ("50%", 50),
        ("AZYUK2A", None),
        ("x2", None),
        ("h_2", None),
        ("\u03b8_2", None),
        ("caf\u00e92", None),
        ("x\uff17\uff12", None),
        ("_72_", 72),
        ("so it is __-72__", -72),
        ("\u7b54\u6848\u662f72\u3002", 72),  # Chinese, Japanese and Korean have no space there
        ("\u5171-72\u4e2a", -72),
        ("\u7b54\u3048\u306f72\u3067\u3059", 72),
        ("\uc815\ub2f5\uc74072\uc785\ub2c8\ub2e4", 72),
        ("1" * 101, None),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: Fraction | int | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("from 1,234.50 to -7 it fell", "-7"),
        ("it is -$1,234.50", "-1234.50"),
        (r"\$-5", "-5"),
        ("3/4", "3/4"),
        (r"so \frac{3}{4}", r"\frac{3}{4}"),
        ("10 - 5", "5"),
        ("1/0", None),
        ("none", None),
    ],
)
def test_the_last_number_as_it_is_written(text: str, written: str | None) -> None:
    assert last_number_text(text) == written


@given(st.text(alphabet=st.sampled_from(r"0123456789,.-+/$\{}e frac boxed<answer>") | st.characters()))
def test_any_text_can_be_searched(text: str) -> None:
    last_tagged(text)
    last_number(text)
    assert all(text[b.start : b.end].rstrip("}").startswith("\\") for b in boxes(text))


@given(st.fractions(max_denominator=10**6), st.sampled_from(["{}", "so it is {}.", "${}$", "1 + 1 = {}", "**{}**"]))
def test_a_number_is_read_as_it_was_written(number: Fraction, frame: str) -> None:
    assert last_number(frame.format(number)) == number


@pytest.mark.parametrize(
    "piece", ["<answer>", "</answer>", r"\boxed{", "{", "}", "1,", "1/ ", "1   ", "-", r"\frac{1}", "1" * 50, "$-"]
)
def test_long_texts_take_no_longer_than_their_length(piece: str) -> None:
    text = piece * (400_000 // len(piece))
    start = time.process_time()
    last_tagged(text)
    last_boxed(text)
    last_number(text)
    assert time.process_time() - start < 3
