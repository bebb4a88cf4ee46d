"""The size of a formula, bounded without working it out."""

from __future__ import annotations

import math
import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.rewards._latex import TOKEN, group, is_modest


@pytest.mark.parametrize(
    "formula",
    [
        "7",
        r"\frac{1}{2004!}",
        "2^{2023}",
        r"x^{2023} + \left(x + 1\right)^{100}",
        r"e^{-\frac{x^2}{2\sigma^2}}",
        "10^{100}",
        "2^{2^{5}} + 1",
        r"\binom{2023}{1011}",
        r"\left(1 + \frac{0.05}{365}\right)^{3650}",
        "2^{0.3333333}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        "+".join(["x^2"] * 200),
        "1,000,000",
        ",".join(map(str, range(200))),
        "",
    ],
)
def test_what_answers_look_like(formula: str) -> None:
    assert is_modest(formula)


@pytest.mark.parametrize(
    "formula",
    [
        "10^{10^{10}}",
        "9^9^9^9",
        "9 ** 9 ** 9",
        "(((((9^9)^9)^9)^9)^9)^9",
        r"\left(\left(9^{99}\right)^{99}\right)^{99}",
        "|9^{9999}|^{9999}",
        r"\frac{9^{9999}}{1}^{9999}",
        r"\{9^{9999}\}^{9999}",
        "-2^{-99999999}",
        "100000000!",
        "((9!)!)!",
        "3!!!!!",
        r"\binom{1000000000}{500000000}",
        "(1000000000)_{5}",
        r"\Gamma(10^{10})",
        r"P_{10^9}^{5}",
        r"\sin(10^{1000000})",
        r"\sum_{k=1}^{1000000000} k",
        r"\prod_{k=1}^{100000000} k",
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{1000000000}",
        "9" * 200_000,
        "(" * 17 + "1" + ")" * 17,
        "{" * 100_000,
        "^" * 5_000,
        "x^" * 5_000,
        "|" * 60,
    ],
)
def test_what_is_too_much(formula: str) -> None:
    start = time.process_time()
    assert not is_modest(formula)
    assert time.process_time() - start < 1


def both(left: tuple[str, int], sign: str, right: tuple[str, int]) -> tuple[str, int]:
    return f"({left[0]}{sign}{right[0]})", left[1] + right[1] if sign == "+" else left[1] * right[1]


formulas = st.recursive(
    st.integers(0, 50).map(lambda n: (str(n), n)) | st.integers(0, 12).map(lambda n: (f"{n}!", math.factorial(n))),
    lambda inner: (
        st.builds(both, inner, st.sampled_from("+*"), inner)
        | st.builds(lambda base, n: (f"({base[0]})^{n}", base[1] ** n), inner, st.integers(0, 3))
    ),
    max_leaves=6,
)


@given(formulas)
def test_it_is_a_bound(formula: tuple[str, int]) -> None:
    assert math.log10(max(1, formula[1])) <= group(deque(TOKEN.findall(formula[0]))) + 1e-9


@given(st.text(alphabet=st.sampled_from(r"0123456789.,^*!_(){}[]|\x ") | st.characters()))
def test_any_text_has_an_answer(text: str) -> None:
    assert is_modest(text) in (True, False)
