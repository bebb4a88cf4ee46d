r"""Mathematics in boxes: what is the same, what is not, what cannot be told, and what must not take forever."""

from __future__ import annotations

import logging
import random
import threading
import time
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError
from nanorlhf.rewards.boxed_math import answer_in, boxed_math, check, gold
from nanorlhf.scoring.reward import find_rewards
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.types import Prompt, Sample

MATRIX = r"\begin{pmatrix} 0 & 3 \\ 0 & -1 \end{pmatrix}"
DOMAIN = r"[-1, -\frac{1}{2}) \cup (-\frac{1}{2}, 0) \cup (0, 1) \cup (1, \infty)"


def expect(right: Any, completion: Any, reward: float | None, **options: Any) -> None:
    assert boxed_math([completion], [right], **options) == [reward]


@pytest.mark.parametrize(
    ("answer", "said", "reward"),
    [
        # numbers and fractions
        ("-5", "-5", 1),
        ("7425000", "7,425,000", 1),
        ("1,000", "1000.0", 1),
        ("14916", "14{,}916", 1),
        ("16386.20", r"\$16,\!386.20", 1),
        (84, "84", 1),
        (0.5, r"\frac{1}{2}", 1),
        ("10/9", r"\dfrac{10}{9}", 1),
        ("1/3", r"\frac13", 1),
        (r"\frac{1}{12}", "0.0833333333333333", 1),
        ("1/3", "0.33", 0),
        ("2", r"\frac{1+\sqrt{5}}{2}", 0),
        ("12", "21", 0),
        # percent and units
        (r"28\%", "28", 1),
        (r"28\%", r"28\%", 1),
        ("0.28", "28", 0),
        ("0.28", r"28\%", 1),
        (r"15\mbox{ cm}^2", r"15 \text{ cm}^2", 1),
        (r"90^\circ", "90", 1),
        # expressions
        ("2-2p", "2(1-p)", 1),
        (r"3\sqrt{13}", r"\sqrt{117}", 1),
        (r"\sqrt{2}+\sqrt{5}", r"\sqrt 5+\sqrt 2", 1),
        (r"\tan^2(y)+1", r"\sec^2(y)", 1),
        (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}", 1),
        (r"\frac{9}{4}\pi", r"2.25\pi", 1),
        ("x+2n+1", "x+1", 0),
        (r"1\sqrt{19}", "1", 0),
        # sets, intervals, pairs
        ("[0,1)", "[0, 1)", 1),
        ("(0,9)", "[0,9)", 0),
        (DOMAIN, DOMAIN.replace(r"\frac{1}{2}", r"\tfrac12"), 1),
        (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)", 1),
        ("(6,31,-1)", "(6,31,1)", 0),
        ("-2,1", "1,-2", 1),
        (r"1 \pm \sqrt{19}", r"1 \pm \sqrt{19}", 1),
        (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1\pm\sqrt{5}\}", 1),
        ("{1,3} \\cup {2,4}", "{1,2,3,4}", 1),
        # matrices, equations, inequalities, words
        (MATRIX, MATRIX.replace("pmatrix", "bmatrix"), 1),
        (MATRIX, MATRIX.replace("3", "4"), 0),
        ("x = 11", "11", 1),
        ("11", "x = 11", 1),
        ("2x + z = 1", "1", 0),
        ("34x+45y-20z+100=0", "-34x-45y+20z-100=0", 1),
        ("x < 1", "-x > -1", 1),
        ("x < 1", "x > -1", 0),
        ("1 < x < 2", "(1, 2)", 1),
        ("(1, 2)", "1 < x < 2", 0),  # the question again is no solution
        (r"\text{Evelyn}", r"\text{Evelyn}", 1),
        (r"\text{Evelyn}", r"\text{Carla}", 0),
        # malformed
        ("7", "", 0),
        ("7", r"\frac{7", 0),
        ("7", r"\sqrt{", 0),
        ("7", r"\begin{pmatrix} 7", 0),
        ("7", "seven", 0),
        ("7", "7 7", 0),
        ("1/2", r"\frac{1}{0}", 0),
    ],
)
def test_what_math_verify_says_of_a_box(answer: Any, said: str, reward: float) -> None:
    for frame in (r"Thus $x$ is $\boxed{%s}$.", r"First 3. \[\boxed{%s}\]", r"\fbox{%s}"):
        expect(answer, frame.replace("%s", said), reward)
        expect(answer, [{"role": "assistant", "content": frame.replace("%s", said)}], reward, need_boxed=True)


@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        ("7", r"\boxed{6}, \boxed{7}", 0),  # said together, they are two answers
        ("7", r"\boxed{6} no, \boxed{7}", 1),
        ("7", r"\boxed{6}. But that is not even right for x = 2. So it is \boxed{7}", 1),
        ("7", r"\boxed{7}. But that is not even right for x = 2. So it is \boxed{6}", 0),
        ("{1, 2}", r"\boxed{1} and \boxed{2}", 1),
        ("(98, 2), (99, 503)", r"\boxed{(98, 2)} \quad \text{and} \quad \boxed{(99, 503)}", 1),
        ("k = 45, n = 2", r"$\boxed{k = 45}$, $\boxed{n = 2}$", 1),
        ("{1, 2}", r"\boxed{1} no no no no no \boxed{2}", 0),
        ("840", "so \\boxed{840},\n\\boxed{840}", 1),
        ("0.28", r"$\boxed{28}$ %", 1),
        ("7", r"\boxed{\boxed{7}}", 1),
        ("7", r"\\boxed{7}", 1),
        ("7", r"\boxed{7", 0),
        ("7", r"\boxed{7}} and {", 1),
        ("7", r"The final answer is $7$. \boxed{6}", 0),
        ("7", r"The final answer is $7$. \boxed{\frac{6}}", 0),
    ],
)
def test_which_box_counts(answer: str, completion: str, reward: float) -> None:
    expect(answer, completion, reward, need_boxed=True)


@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        ("28", "it is 28", 1),
        (r"28\%", "it is 28 percent", 1),
        ("1/3", r"so $k = \frac{1}{3}$", 1),
        ("9", "Answer \\[ \n 9 \n \\]", 1),
        ("1000.99", "not it's not 10 it's 1,000.99m\u00b2", 1),
        ("2", "AZYUK2A", 0),
        ("10", "9 + 1", 1),
        ("10", "10 or 11", 0),
        ("72", "The final answer is $72$. I hope it is correct. Now 5 + 5.", 1),
        ("72", "9^9^9^9 is large.\nThe answer is 72.", 1),
        ("72", "The answer is 9^9^9^9.", 0),
        ("25000", "The total is $25,000!", 1),  # no factorial in prose
        ("5", "A 25,000 gallon tank is full in 5 hours. The answer is 5", 1),
        ("5", "The answer is $25000!$, and 5.", 0),
        ("7", r"\boxed{6}" + "\n7", 0),
        ("7", "", 0),
    ],
)
def test_without_a_box_the_text_is_searched_unless_one_is_needed(answer: str, completion: str, reward: float) -> None:
    expect(answer, completion, reward)
    expect(answer, completion, 0, need_boxed=True)


@pytest.mark.parametrize(
    "answer", [None, "", "   ", r"\frac{1", "$$", r"\boxed{}", "10^{10^{10}}", "9" * 2000, "(" * 40]
)
def test_what_cannot_be_read_cannot_be_judged(answer: Any) -> None:
    expect(answer, r"\boxed{7}", None)


def test_golds_are_read_in_every_form() -> None:
    worked = r"We have $x = 3$, so $2x + 1 = \boxed{7}$. Check: $7 - 1 = 6$."
    for answer in ("7", 7, 7.0, "7.0", "$7$", r"\(7\)", r"\boxed{7}", worked, "+7", r"\frac{14}{2}"):
        assert gold(str(answer)), answer
        expect(answer, r"\boxed{7}", 1)


def test_places_to_which_decimal_fractions_agree() -> None:
    expect("1/3", r"\boxed{0.333}", 0)
    expect("1/3", r"\boxed{0.333}", 1, decimals=3)


def test_in_a_thread_there_is_no_alarm_and_all_else_is_the_same() -> None:
    scores: list[Any] = []
    worker = threading.Thread(target=lambda: scores.extend(boxed_math([r"\boxed{\frac{14}{2}}", "?"], ["7", "7"])))
    worker.start()
    worker.join()
    assert scores == [1, 0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # rung in a collector's callback
def test_nothing_is_said_and_nothing_takes_longer_than_its_time(caplog: pytest.LogCaptureFixture) -> None:
    start = time.perf_counter()
    with caplog.at_level(logging.DEBUG):
        expect("7", r"\boxed{(x+y+z)^{1000} - \int_0^1 \sin(x^{x^x}) e^{x^2} dx}", 0)
        expect("7", "1 (2)", 0)
    assert time.perf_counter() - start < 8
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


ATOMS = ["1", "9", "10", "99999999", "x", "n", r"\pi", "e", "0.333333", "1,000", r"\infty", "-", r"\text{cm}", "9" * 50]
SIGNS = ["+", "-", "*", "/", "^", "**", "=", "<", ",", "!", "", " ", "_", r"\cdot ", r"\cup ", r"\pm ", r"\bmod "]
FRAMES = [
    "(%s)", "{%s}", r"\sqrt{%s}", r"\sqrt[3]{%s}", r"\left(%s\right)", "[%s)", r"\{%s\}", "|%s|", r"\sin(%s)",
    r"\log_{2}{%s}", r"\binom{%s}{9}", r"\sum_{k=1}^{%s} k", r"\prod_{k=1}^{%s} k", r"\int_0^{%s} x dx", "9^{%s}",
    r"\lim_{x\to %s} x", r"\Gamma(%s)", r"\lfloor %s\rfloor", "(%s)!", r"\frac%s", r"\frac{1}{1+%s}", r"\boxed{%s}",
    r"\begin{pmatrix}%s & 1\\ 2 & 3\end{pmatrix}",
]  # fmt: skip
TAILS = ["$", "$$", r"\[", r"\boxed{", "answer: ", "final answer is $", "1,", "1/", r"\frac{", "(", "9^", "9**", "|"]


def formula(draw: random.Random, deep: int) -> str:
    """A formula that nobody would write."""
    if not deep:
        return draw.choice(ATOMS)
    if draw.random() < 0.35:
        return formula(draw, deep - 1) + draw.choice(SIGNS) + formula(draw, deep - 1)
    return draw.choice(FRAMES).replace("%s", formula(draw, deep - 1))


def attack(draw: random.Random) -> str:
    """A completion made to break things: nested, huge, cut off, strewn with marks."""
    inside = formula(draw, draw.randrange(1, 5))
    kind = draw.randrange(6)
    if kind == 0:
        opening, closing = draw.choice(
            [("(", ")"), (r"\frac{1}{1+", "}"), (r"\sqrt{2+", "}"), ("{", "}"), ("2^{", "}")]
        )
        times = draw.randrange(1, 80)
        return rf"\boxed{{{opening * times}1{closing * times * draw.randrange(2)}}}"
    if kind == 1:
        return rf"\boxed{{{'9' * draw.choice([10, 300, 5000, 100_000])}{draw.choice(['', '!', '^9', '^{99}', ' x'])}}}"
    if kind == 2:
        return draw.choice(TAILS) * draw.randrange(1, 3000) + inside
    if kind == 3:
        marks = list(rf"\boxed{{{inside}}}")
        for _ in range(5):
            marks.insert(draw.randrange(len(marks)), draw.choice("\0\n\\{}$\u221e\u202e\u00d7\U0001f600"))
        return "".join(marks)
    return inside if kind == 4 else rf"\boxed{{{inside}}}"


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (r"\boxed{18.90}", r"\$18.90"),
        (r"\boxed{32348}", r"\$32,\!348"),
        ("\\boxed{\n\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}\n}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("\\boxed{\n\\frac{1}{2}\n}", "\\frac{1}\n{2}"),
    ],
)
def test_dollars_and_ends_of_lines_hide_no_answer(said: str, right: str) -> None:
    assert boxed_math([said, r"\boxed{77}"], [right, right]) == [1, 0]


@pytest.mark.slow
def test_a_thousand_attacks_are_answered_in_time_by_workers() -> None:
    draw, start = random.Random(0), time.perf_counter()
    golds = ["7", "x^2+1", r"\frac{1}{2}", "(0,1)", "10^{100}"]
    attacks = [(attack(draw), draw.choice(golds)) for _ in range(1000)] + [(r"\boxed{7}", "7")]
    samples = [
        Sample(Prompt(i, [1], "?", {"answer": a}), [1], [0.0], True, text) for i, (text, a) in enumerate(attacks)
    ]
    with closing(Scorer(find_rewards("boxed_math"), TrainConfig(reward_workers=2, reward_timeout=10))) as scorer:
        scorer.score(samples)
        metrics = scorer.report()
    assert metrics["reward/boxed_math/failed"] == 0, "math-verify's own alarm is faster than the worker's end"
    assert metrics["reward/boxed_math/unscored"] == 0
    assert {s.reward for s in samples} == {0, 1} and samples[-1].reward == 1
    assert time.perf_counter() - start < 300


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet=st.sampled_from(r"0123456789.,+-/^{}()$\x ") | st.characters(), max_size=40))
def test_any_text_has_a_score(text: str) -> None:
    scores = boxed_math([text, rf"\boxed{{{text}}}"], ["7", "7"])
    assert set(scores) <= {0, 1}
    assert boxed_math([r"\boxed{7}"], [text])[0] in (None, 0, 1)


def test_answers_are_found_in_long_texts() -> None:
    start = time.process_time()
    assert answer_in(r"\boxed{" * 50_000 + "7" + "}" * 50_000, need_boxed=True) is None
    assert answer_in("x" * 500_000 + r"\boxed{7}", need_boxed=True) == "$7$"
    assert answer_in(r"\boxed{1}, " * 40_000, need_boxed=True) == "$1$"
    assert time.process_time() - start < 5


@pytest.mark.parametrize("decimals", [-1, 2.0, 99])
def test_options_are_checked_as_they_are_read(decimals: Any) -> None:
    check(decimals=3)
    with pytest.raises(UsageError, match="decimals"):
        check(decimals=decimals)


@pytest.mark.parametrize(
    ("answer", "said", "reward"),
    [("4", "2+2", 1), ("2^{-99}", "2^{-98}", 1), ("0.1", "0.2", 0), (r"\frac{1}{2}", r"\int_0^1 x dx", 1)],
)
def test_habits_of_math_verify_that_the_page_warns_of(answer: str, said: str, reward: float) -> None:
    expect(answer, rf"\boxed{{{said}}}", reward)
