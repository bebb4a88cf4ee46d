"""Numbers as GSM8K gives them and as models write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.errors import UsageError
from nanorlhf.rewards.numeric import check, numeric

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"


@pytest.mark.parametrize(
    ("completion", "answer", "loose", "strict"),
    [
        # one number, many ways to say it
        ("<answer>72</answer>", GSM8K, 1, 1),
        ("48 + 24 = 72\n#### 72", GSM8K, 1, 1),
        (r"so \boxed{72}", GSM8K, 1, 1),
        ("She sold 72 clips.", GSM8K, 1, 0),
        ("#### 72 clips\nThat was 2 months.", GSM8K, 1, 1),
        ("<answer> $1,234.50 </answer>", "1234.5", 1, 1),
        (r"<answer>\$1{,}234.50</answer>", 1234.5, 1, 1),
        ("<answer>72.</answer>", 72, 1, 1),
        ("<answer>72.00</answer>", "72", 1, 1),
        ("<answer>x = 72 apples</answer>", "72", 1, 1),
        (r"\boxed{\frac{1}{2}}", "0.5", 1, 1),
        ("<answer>1/2</answer>", "0.5", 1, 1),
        ("<answer>\u22125</answer>", "-5", 1, 1),
        ("<answer>-$5</answer>", "-5", 1, 1),
        ("<answer>50%</answer>", "50", 1, 1),
        ("<answer>7.2e1</answer>", "72", 1, 1),
        ("<answer>1,000,000</answer>", "#### 1,000,000", 1, 1),
        ([{"role": "assistant", "content": "72"}], 72, 1, 0),
        # which number counts
        ("<answer>72</answer> or was it 73?", "72", 1, 1),
        ("<answer>71</answer> no: <answer>72</answer>", "72", 1, 1),
        (r"<answer>72</answer> \boxed{73} #### 74", "72", 1, 1),
        (r"\boxed{73} #### 72", "72", 1, 1),
        ("#### 71\n#### 72", "72", 1, 1),
        ("#### **$72**", "72", 1, 1),
        ("#### Step 2: total\n48+24=72\nso \\boxed{72}", "72", 1, 1),  # a heading
        ("#### Step 2: total\n48+24=72", "2", 0, 0),
        ("<answer>72 cm^2</answer>", "72", 1, 1),
        (r"\boxed{72\text{ m}^{-2}}", "72", 1, 1),
        (r"<answer>72</answer>", "72 m^3", 1, 1),
        ("72, 73", "72", 0, 0),
        ("<answer>72 or 73</answer>", "72", 0, 0),
        ("72 <answer>seventy-two</answer>", "72", 0, 0),
        ("72 ####", "72", 0, 0),
        # wrong and malformed
        ("<answer>73</answer>", "72", 0, 0),
        ("<answer>-72</answer>", "72", 0, 0),
        ("<answer>0.72</answer>", "72", 0, 0),
        ("<answer>721</answer>", "72", 0, 0),
        ("<answer>1/0</answer>", "72", 0, 0),
        ("<answer>72", "72", 1, 0),
        (r"\boxed{72", "72", 1, 0),
        ("", "72", 0, 0),
        ("<answer></answer>", "72", 0, 0),
        ("<answer>nan</answer>", "72", 0, 0),
        ("<answer>1e999</answer>", "72", 0, 0),
        (f"<answer>{'9' * 100_000}</answer>", "72", 0, 0),
        # a column that gives no number
        ("<answer>72</answer>", "seventy-two", None, None),
        ("<answer>72</answer>", "71 or 72", None, None),
        ("<answer>72</answer>", "nan", None, None),
        ("<answer>72</answer>", "", None, None),
        ("<answer>72</answer>", None, None, None),
        ("<answer>72</answer>", "72 ####", None, None),
    ],
)
def test_table(completion: Any, answer: Any, loose: float | None, strict: float | None) -> None:
    assert numeric([completion], [answer]) == [loose]
    assert numeric([completion], [answer], strict=True) == [strict]


def test_tolerance_is_inclusive_and_exact() -> None:
    texts = ["3.14", "3.24", "3.04", "3.241", "3.039"]
    assert numeric(texts, ["3.14"] * 5, tolerance=0.1) == [1, 1, 1, 0, 0]
    assert numeric(["0.33"], ["1/3"]) == [0]


@given(st.text(alphabet=st.sampled_from(r"0123456789,.-+/$\{}e#<answer>") | st.characters()), st.booleans())
def test_any_text_is_right_or_wrong(text: str, strict: bool) -> None:
    assert set(numeric([text, f"<answer>{text}</answer>"], ["72"] * 2, strict=strict)) <= {0, 1}
    assert numeric(["72"], [text])[0] in (None, 0, 1)


@pytest.mark.parametrize("tolerance", [-1, float("nan"), float("inf")])
def test_options_are_checked_as_they_are_read(tolerance: float) -> None:
    check(tolerance=0)
    with pytest.raises(UsageError, match="tolerance"):
        check(tolerance=tolerance)
