"""The reward of Reasoning Gym's tasks: their own scores, and answers that would like to be run."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.errors import UsageError
from nanorlhf.rewards.reasoning import FORMULAS, LITERALS, is_formula, reasoning
from nanorlhf.tasks.reasoning_gym import reasoning_gym_dataset, registry

SUM = {"question": "4 + 3 =", "answer": "7", "metadata": {"source_dataset": "chain_sum"}}
GRID = {"question": "?", "answer": "1 2 3 6 9 8 7 4 5", "metadata": {"source_dataset": "spiral_matrix"}}
GAME = {"question": "?", "answer": "4*3*2*1", "metadata": {"source_dataset": "puzzle24", "numbers": [4, 3, 2, 1]}}
RIGHT = "<answer>7</answer>"


@pytest.mark.parametrize(
    ("completion", "reward", "tagged"),
    [
        (RIGHT, 1, 1),
        ("<think>4 and 3</think> <answer> 7\n</answer>", 1, 1),
        ("<answer>8</answer> or rather <answer>7</answer>", 1, 1),
        ([{"role": "assistant", "content": RIGHT}], 1, 1),
        (" 7\n", 1, 0),
        ("<answer>8</answer>", 0, 0),
        ("7 <answer>8</answer>", 0, 0),
        ("<answer></answer>", 0, 0),
        ("", 0, 0),
        ("eight", 0, 0),
    ],
)
def test_table(completion: Any, reward: float, tagged: float) -> None:
    assert reasoning([completion], [json.dumps(SUM)], prompts=["?"]) == [reward]
    assert reasoning([completion], [SUM], need_tags=True) == [tagged]


def test_a_task_may_give_a_part() -> None:
    assert 0 < (reasoning(["it is 7"], [SUM])[0] or 0) < 1  # the answer is in there
    assert reasoning(["it is 7"], [SUM], need_tags=True) == [0]


def test_what_has_no_entry_has_no_score() -> None:
    assert reasoning([RIGHT, RIGHT], [None, json.dumps(SUM)]) == [None, 1]
    with pytest.raises(UsageError, match="did you mean 'chain_sum'"):
        reasoning([RIGHT], [{**SUM, "metadata": {"source_dataset": "chain_sums"}}])


def test_answers_that_would_run_are_only_read(tmp_path: Path) -> None:
    made = tmp_path / "made"
    code = f"__import__('os').mkdir({str(made)!r})"
    spelled = "+".join(f"chr({ord(letter)})" for letter in code)  # if quotes would not do
    for task in LITERALS | FORMULAS:
        entry = reasoning_gym_dataset(task, "{size: 1}", "train")[0]["entry"]
        for attack in (code, f"[{code}]", f"eval({spelled})", f"exec({spelled})"):
            score = reasoning([f"<answer>{attack}</answer>"], [entry])[0]
            assert score is not None and score < 0.2
    assert not made.exists()
    from reasoning_gym.factory import get_score_answer_fn

    get_score_answer_fn("puzzle24")(f"eval({spelled})", GAME)  # type: ignore[call-arg]
    assert made.exists()  # that is what it would have done


def test_literals_are_read_as_before() -> None:
    assert reasoning([GRID["answer"]], [GRID]) == [1]
    assert 0 < (reasoning(["[1, 2, 3, 6, 9, 8, 7, 4, 5]"], [GRID])[0] or 0) < 1


def test_the_list_of_scorers_that_run_answers_is_complete() -> None:
    runs = {"eval", "exec", "compile", "parse_expr", "sympify", "parse_latex"}
    found = set()
    for task, (made, _) in registry().items():
        tree = ast.parse(textwrap.dedent(inspect.getsource(made.score_answer)))
        called = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        found |= {task} if called & runs else set()
    assert found - {"number_sorting"} == LITERALS | FORMULAS  # number_sorting runs the right answer, which is its own


@pytest.mark.parametrize(
    "answer", ["2*x**2 + C", "-5*cos(x) + 2*X", "(4 + 2) * 4 * 1", "x^2/2 + exp(x)*log(3.5)", ".5*x", "7"]
)
def test_formulas(answer: str) -> None:
    assert is_formula(answer)


@pytest.mark.parametrize(
    "answer",
    ["x.real", "(x). real", "open(1)", "S(x)", "N(1, 99999)", "Q", "[1]", "'a'", "lambda: 0", "x if x else x", "x; x",
     "__x__", "9**9**9", "9^9^9", "100!", "Integral(x, x)", "f'{x}'", "x @ x", "x == {}", "(" * 17 + "x" + ")" * 17],
)  # fmt: skip
def test_no_formulas(answer: str) -> None:
    assert not is_formula(answer)


def test_nothing_is_worked_out_forever() -> None:
    start = time.process_time()
    assert reasoning(["<answer>9**9**9**9</answer>"], [GAME])[0] == 0.01
    assert time.process_time() - start < 5


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("0123456789+-*/() []{}',\"\nab<answer>") | st.characters()))
def test_any_text_has_a_score(text: str) -> None:
    factors = {
        "question": "?",
        "answer": "2 \u00d7 3",
        "metadata": {"source_dataset": "prime_factorization", "number": 6, "factors": [2, 3]},
    }
    for entry in (SUM, GRID, GAME, factors):
        score = reasoning([text], [entry])[0]
        assert score is not None and 0 <= score <= 1
