"""Countdown: the expression in the last <answer> tags must reach the `target` with the row's numbers.

Columns: `nums` or `numbers`, and `target`. Each number is used exactly once, with + - * / and parentheses; the value
is worked out exactly, with fractions, from the syntax tree: nothing a completion says is ever run.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from nanorlhf.data.answers import MINUS, last_tagged, text_of
from nanorlhf.errors import UsageError

LONGEST = 300  # characters of an expression
EXPRESSION = re.compile(r"[0-9+\-*/() \t]+")
SIGNS = MINUS | str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/"})
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
NODES = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.USub, *OPERATORS)  # no powers, whole divisions, calls or tuples


def countdown(
    completions: list[Any],
    target: list[Any],
    nums: list[Any] | None = None,
    numbers: list[Any] | None = None,
    *,
    use_all: bool = True,
    format_score: float = 0.0,
    **_: Any,
) -> list[float | None]:
    """1 for an expression that reaches the target, `format_score` for another that can be read, else 0.

    Without `use_all` some of the numbers may be left over, but none used twice.
    """
    given = nums if nums is not None else numbers
    if given is None:
        raise UsageError("the reward 'countdown' needs the column 'nums' or 'numbers'")
    rows = zip(completions, given, target, strict=True)
    return [
        None
        if goal is None or not own
        else judged(text_of(completion), list(map(int, own)), goal, use_all, format_score)
        for completion, own, goal in rows
    ]


def check(format_score: float, **_: Any) -> None:
    """Refuses a score for the form alone that is no less than that for the answer."""
    if not 0 <= format_score < 1:
        raise UsageError(f"reward_options: countdown's format_score={format_score!r} must be 0 or more, and below 1")


def judged(text: str, own: list[int], target: Any, use_all: bool, format_score: float) -> float:
    """The score of one completion."""
    tree = read(last_tagged(text) or "")
    if tree is None:
        return 0.0
    used, there = Counter(constants(tree)), Counter(own)
    fair = used == there if use_all else used <= there
    return 1.0 if fair and value_of(tree) == Fraction(target) else format_score


def read(expression: str) -> ast.expr | None:
    """The syntax tree of an expression of whole numbers; nothing if it is anything else."""
    plain = expression.strip().translate(SIGNS)
    if len(plain) > LONGEST or not EXPRESSION.fullmatch(plain):
        return None
    try:
        tree = ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: too deep
        return None
    return tree if all(isinstance(node, NODES) for node in ast.walk(tree)) else None


def constants(tree: ast.expr) -> list[Any]:
    """The numbers an expression uses."""
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def value_of(tree: ast.expr) -> Fraction | None:
    """The value of an expression, exactly; nothing if it divides by zero."""
    if isinstance(tree, ast.Constant):
        assert isinstance(tree.value, int)
        return Fraction(tree.value)
    if isinstance(tree, ast.UnaryOp):
        value = value_of(tree.operand)
        return None if value is None else -value
    assert isinstance(tree, ast.BinOp)
    left, right = value_of(tree.left), value_of(tree.right)
    if left is None or right is None or (right == 0 and isinstance(tree.op, ast.Div)):
        return None
    return OPERATORS[type(tree.op)](left, right)
