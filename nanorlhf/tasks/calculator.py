"""An environment for stepwise mathematics: what stands in <calc> tags is worked out, and the model writes on."""

from __future__ import annotations

import random
import re
from typing import Any
from zlib import crc32

from simpleeval import InvalidExpression, SimpleEval

CALL = re.compile(r"<calc>([^<]*)</calc>\Z")
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
LONGEST = 200  # characters of an expression
LARGEST = 1e15  # beyond it a float is no longer exact to the unit


class Calculator:
    """Ends with an answer in tags, and is worth 1 if that is the row's `answer`."""

    stop = ("</calc>",)

    def reset(self, answer: str, **_: Any) -> None:
        self.answer = str(answer).strip()

    def step(self, completion: str) -> tuple[str, float, bool]:
        call = CALL.search(completion)
        if call:
            return f"<result>{calculated(call[1])}</result>", 0.0, False
        given = ANSWER.findall(completion)
        return "", float(bool(given) and given[-1] == self.answer), True


def calculated(expression: str) -> str:
    """The value of an arithmetic expression, or `error`: numbers, + - * / // % ** and parentheses, nothing else."""
    if len(expression) > LONGEST or not re.fullmatch(r"[\d\s.+\-*/%()]*", expression):
        return "error"
    try:
        value = SimpleEval(names={}, functions={}).eval(expression.strip())
    except (InvalidExpression, SyntaxError, ArithmeticError, ValueError, TypeError, MemoryError, RecursionError):
        return "error"
    if not isinstance(value, int | float) or not abs(value) <= LARGEST:  # "..." and "'a'" are values too
        return "error"
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def problems(split: str) -> list[dict[str, Any]]:
    """Sums of three two-digit numbers, with an answer to each for a start: half call the calculator, half guess."""
    if split not in ("train", "test"):
        raise ValueError(f"the calculator's problems have no split {split!r}: choose 'train' or 'test'")
    draw, rows = random.Random(split), []
    for _ in range(4000):
        a, b, c = (draw.randrange(10, 100) for _ in range(3))
        if (crc32(f"{a}+{b}+{c}".encode()) % 10 == 0) != (split == "test"):
            continue
        call = f"<calc>{a}+{b}+{c}</calc><result>{a + b + c}</result><answer>{a + b + c}</answer>"
        guess = f"<answer>{a + b + c + draw.randrange(-20, 21)}</answer>"
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{a}+{b}+{c}="}],
                "answer": str(a + b + c),
                "completion": [{"role": "assistant", "content": draw.choice([call, guess])}],
            }
        )
    return rows
