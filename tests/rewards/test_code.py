"""Programs that are right, wrong, broken, and that would rather not be tested."""

# ruff: noqa: E501  a program and its test stand in one line

from __future__ import annotations

import json
from typing import Any

import pytest

from nanorlhf.errors import UsageError
from nanorlhf.rewards.code import check, code, program_in
from nanorlhf.sandbox import run
from nanorlhf.sandbox.run import METHODS, SandboxError
from nanorlhf.scoring.reward import find_rewards

DOUBLE = "def f(x):\n    return 2 * x"
ECHO = "print(input()[::-1])"


def score(program: str, tests: Any, entry_point: str | None = None, **options: Any) -> float | None:
    """The score, contained if this machine can, for the tests of the sandbox see to that."""
    options = {"seconds": 5.0, "unsafe_code": True} | options
    return code([f"```python\n{program}\n```"], [tests], [entry_point], **options)[0]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each method in turn; one that does not work here is skipped, with the reason."""
    why = run.refusal(request.param)
    if why:
        pytest.skip(f"{request.param}: {why}")
    monkeypatch.setattr(run, "find_method", lambda unsafe: request.param)
    return request.param


@pytest.mark.parametrize(
    ("program", "test"),
    [
        (DOUBLE, "assert f(3) == 6 and f('ab') == 'abab' and f(x=1.5) == 3.0"),
        ("def f(x): x.sort(); x.append([0])", "x = [3, 1]\nf(x)\nassert x == [1, 3, [0]]"),
        ("def f(x): x['a'] = {1}; x.pop('b')", "x = dict(b=1)\nf(x=x)\nassert x == {'a': {1}}"),
        ("def f(x): return x, {x: [x, None]}, {x}, frozenset([x])", "assert f(1) == (1, {1: [1, None]}, {1}, {1})"),
        ("def f(): return float('inf'), 2 ** 20000, 1j, b'a', range(3)", "assert f()[1] == 2 ** 20000 and f()[2] == 1j"),
        ("from collections import *\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("from collections import *\nP = namedtuple('P', 'x y')\ndef f(x): return P(x, x)", "assert f(1) == (1, 1)"),
        ("from collections import *\ndef f(x): return deque(x)", "from collections import deque\nassert f('a') == deque('a')"),
        ("import datetime\ndef f(): return datetime.date(2020, 2, 1)", "assert f() == datetime.date(2020, 2, 1)"),
        ("from fractions import *\ndef f(): return Fraction(1, 2)", "assert f() == 0.5 and f() == Fraction(1, 2)"),
        ("from decimal import *\ndef f(x): return x + 1", "import decimal\nassert f(decimal.Decimal('0.5')) == 1.5"),
        ("def f():\n    yield 1\n    yield 2", "assert list(f()) == [1, 2] and next(f()) == 1 and sum(f()) == 3"),
        ("def f():\n    while True: yield 1", "for n, one in zip(range(3), f()): assert one == 1"),
        ("def f(x): return lambda y: x + y", "assert f(1)(2) == 3"),
        ("def f(x): raise KeyError(x)", "try: f(1)\nexcept KeyError: pass\nelse: raise SystemExit"),
        ("class E(ValueError): pass\ndef f(x): raise E('no')", "try: f(1); assert 0\nexcept ValueError as e: assert 'no' in str(e)"),
        ("class Solution:\n    def twice(self, x): return 2 * x", "assert Solution().twice(4) == 8"),
        ("class P:\n    def __init__(self, x): self.x = x\ndef f(ps): return sum(p.x for p in ps)", "assert f([P(1), P(2)]) == 3"),
        (
            "class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return V(self.x + o.x)\n"
            "    def __eq__(self, o): return self.x == o.x\n    def __repr__(self): return f'V({self.x})'",
            "assert V(1) + V(2) == V(3) and V(1) != V(2) and repr(V(1)) == 'V(1)' and f'{V(1)}' == 'V(1)'\n"
            "v = V(1)\nv.x = 5\nassert v.x == 5",
        ),
        ("class S:\n    def __len__(self): return 2\n    def __getitem__(self, i): return [5, 6][i]", "assert [*S()] == [5, 6] and len(S()) == 2"),
        ("import numpy\ndef f(x): return numpy.int64(x)\ndef g(x): return numpy.arange(x)", "assert f(3) == 3\nassert g(3) == [0, 1, 2]"),
        ("import math\nSIZE = 3\ndef f(x): return x / 3", "assert math.isclose(f(1), .3333333333) and SIZE == 3"),
        ("def f(x): return 1 if x < 2 else x * f(x - 1)", "assert f(200) % 1000 == 0"),
        ("def f(x): print(x); return x", "assert f('True') == 'True'\nprint('False')"),
        ("def f(x): return x", "nested = []\nfor _ in range(50): nested = [nested]\nassert f(nested) == nested"),
        ("if __name__ == '__main__': raise SystemExit\ndef f(x): return x", "assert f(None) is None"),
    ],
)  # fmt: skip
def test_right_programs_pass(program: str, test: str) -> None:
    if "numpy" in program and run.find_method(True) == "uid":
        pytest.skip("the interpreter may be another, without this environment's packages")
    assert score(program, test) == 1


@pytest.mark.parametrize(
    ("tests", "entry_point", "want"),
    [
        (["assert f(1) == 2", "assert f(2) == 5", "assert f(3) == 6"], None, 2 / 3),
        (["import math\nnumber = 1", "assert f(number) == 2"], None, 1),
        (["assert g(1) == 2", "assert f(1) == 2"], None, 1 / 2),
        ("assert f(1) == 2\nassert f(2) == 5", None, 0),
        ("def check(candidate):\n    assert candidate(1) == 2", "f", 1),
        ("def check(candidate):\n    assert candidate(1) == 3", "f", 0),
        ("def check(candidate):\n    assert candidate(1) == 2", "g", 0),
        ("def check():\n    assert f(1) == 2\ncheck()", None, 1),
        ("from solution import f\ndef test_a(): assert f(1) == 2\ndef test_b(): assert f(1) == 3", None, 1 / 2),
        ("import solution\ndef test_a(n=1): assert solution.f(n) == 2", None, 1),
        ("def test_a(): assert f(1) == 2\ndef test_b():\n    while f(1): pass\ndef test_c(): assert f(1) == 2", None, 1 / 3),
        (["assert f(1) == 2", "while f(1): pass", "assert f(1) == 2", "assert f(1) == 2"], None, 1 / 4),
        (json.dumps(["assert f(1) == 2", "assert f(1) == 3"]), None, 1 / 2),
        ("[f(1) for _ in range(3)] == [2] * 3 or exit()", None, 1),
    ],
)  # fmt: skip
def test_the_share_of_tests_that_pass(tests: Any, entry_point: str | None, want: float) -> None:
    assert score(DOUBLE, tests, entry_point, seconds=0.7) == pytest.approx(want)


def test_all_or_nothing() -> None:
    tests = ["assert f(1) == 2", "assert f(2) == 4", "assert f(3) == 5"]
    assert score(DOUBLE, tests, all_or_nothing=True) == 0
    assert score(DOUBLE, tests[:2], all_or_nothing=True) == 1
    assert score(DOUBLE, [], all_or_nothing=True) is None


@pytest.mark.parametrize(
    ("tests", "want"),
    [
        ([{"input": "ab\n", "output": "ba\n"}, {"input": "abc", "output": "abc"}], 1 / 2),
        ({"inputs": ["ab", "ac", "ad"], "outputs": ["ba", "ca", "da"]}, 1),
        ({"input": ["ab", "x"], "output": [["ba"], "y"]}, 1 / 2),
        ({"input": "ab", "output": "ba  \n\n"}, 1),
        (json.dumps({"inputs": ["ab"], "outputs": ["ba"], "fn_name": None}), 1),
        ([{"input": "héé", "output": "ééh"}], 1),
        ([{"input": "", "output": ""}], 0),  # it ends with an error
    ],
)
def test_inputs_and_outputs(tests: Any, want: float) -> None:
    assert score(ECHO, tests) == want


@pytest.mark.parametrize(
    ("program", "want"),
    [
        ("print(int(input()) * 2)", 1),
        ("import threading\nthreading.Thread(target=lambda: print(int(input()) * 2)).start()", 1),
        ("print(int(input()) * 2); exit(0)", 1),
        ("print(int(input()) * 2); exit(1)", 0),
        ("print('2'); print('4')", 0),
        ("print(2)", 1 / 2),
        ("import time\nn = int(input())\nif n > 1: time.sleep(60)\nprint(n * 2)", 1 / 2),
        ("print(2, 'x' * 10_000_000)", 0),
        ("import os, sys; os._exit(0)", 0),
        ("import os; os.kill(os.getppid(), 9); print(int(input()) * 2)", 0),
    ],
)
def test_what_is_written_counts(program: str, want: float) -> None:
    assert score(program, {"inputs": ["1", "2"], "outputs": ["2", "4"]}, seconds=1.0) == want


@pytest.mark.parametrize("row", [None, "", [], {}, "[]"])
def test_without_tests_there_is_no_score(row: Any) -> None:
    assert score(DOUBLE, row) is None
    assert code(["no program"], [row], unsafe_code=True) == [None]


@pytest.mark.parametrize(
    ("tests", "entry_point", "want"),
    [
        ("def check(candidate): assert candidate(1) == 2", None, None),
        ("def test_it(fixture): assert f(1) == 2", None, None),
        ("assert f(1 == 2", None, None),
        ("import no_such_module_anywhere\nassert f(1) == 2", None, None),
        (["assert f((n for n in [1])) == 2", "assert f(1) == 2"], None, 1),
        (["try: f(lambda: 1)\nexcept Exception: pass", "assert f(1) == 3"], None, 0),
    ],
)
def test_faulty_tests_are_no_programs_fault(tests: Any, entry_point: str | None, want: float | None) -> None:
    assert score(DOUBLE, tests, entry_point) == want


@pytest.mark.parametrize(
    "row", [3, [1, 2], [{"in": "a"}], {"inputs": ["a"], "outputs": []}, {"fn_name": "f", "inputs": [], "outputs": []}]
)
def test_tests_of_no_known_form_are_named(row: Any) -> None:
    with pytest.raises(ValueError, match=r"no known form: .*; known are a list of assert statements"):
        score(DOUBLE, row)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("So:\n```python\nx = 1\n```\nThat is it.", "x = 1"),
        ("```python\nx = 1\n```\n```py\nx = 2\n```\n```text\nx = 3\n```", "x = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("```x = 1```\nthen\n```python\nx = 2\n```", "x = 2"),  # the first is code in a line
        ("```Python3 title=a.py\nx = 1\n```", "x = 1"),
        ("1. First\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```python\nx = '''a\n\n'''\n````", "x = '''a\n\n'''"),
        ("<answer>\nx = 1\n</answer>", "x = 1"),
        ("<answer>\n```python\nx = 1\n```\n</answer>", "x = 1"),
        ("```python\nx = 1", None),
        ("```python\nx = 1\n```\nBetter:\n```python\nx = ", "x = 1"),
        ("x = 1", None),
        ("", None),
    ],
)
def test_where_the_program_is(text: str, program: str | None) -> None:
    assert program_in(text) == program


@pytest.mark.parametrize(
    "text", ["no code", "```python\ndef f(x): return 2 * x", "```python\ndef f(:\n```", "```python\n```"]
)
def test_without_a_program_nothing_passes(text: str) -> None:
    assert code([text, [{"role": "assistant", "content": text}]], [["assert f(1) == 2"]] * 2, unsafe_code=True) == [
        0,
        0,
    ]


def test_finding_the_program_takes_time_in_proportion() -> None:
    assert program_in("```a\n" * 300_000) is None


CHEATS = {
    "raises what a faulty test would": "def f(x):\n    raise SyntaxError('x')",
    "gives the tests other builtins": """
def f(x): return 1
def fake(*a, **k): return 0
class Name(str):
    def startswith(self, *a): return False
    __hash__ = str.__hash__
globals().pop("__builtins__")
globals()[Name("__builtins__")] = {"abs": fake, "sorted": lambda x: [6], "__import__": lambda *a: f}
""",
    "ends well": "import sys; sys.exit(0)",
    "ends at once": "import os; os._exit(0)",
    "ends when called": "import os, sys\ndef f(x): sys.exit(0)",
    "ends at once when called": "import os\ndef f(x): os._exit(0)",
    "says what the examiner says": "print('cases 1\\nTrue', flush=True)\nimport os; os.write(1, b'cases 1\\nTrue\\n' * 9)\ndef f(x): pass",
    "says it in every file": """
import os
for n in range(64):
    for path in (n, f'/proc/{os.getppid()}/fd/{n}', f'/proc/1/fd/{n}'):
        try: os.write(os.open(path, 1) if isinstance(path, str) else n, b'cases 1\\nTrue\\n' * 9)
        except OSError: pass
def f(x): pass""",
    "is always equal": """
class A:
    def __getattr__(self, name): return lambda *a: True
    def __eq__(self, other): return True
    __ne__ = lambda self, other: False
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = lambda *a: True
    __sub__ = __rsub__ = __abs__ = lambda *a: 0
    __hash__ = lambda self: 0
def f(x): return A()""",
    "is a number that is always equal": """
class A(int):
    def __eq__(self, other): return True
    def __reduce__(self): return A, ()
    __reduce_ex__ = lambda self, _: (A, ())
def f(x): return A(0)""",
    "replaces Python": """
import builtins
builtins.AssertionError = builtins.open = builtins.print = type("E", (Exception,), {})
sorted, abs = lambda _: [6], lambda _: 0
def f(x): return 1""",
    "replaces the examiner": """
import gc, sys, types
for thing in gc.get_objects():
    try:
        if isinstance(thing, types.FunctionType): thing.__code__ = (lambda *a, **k: True).__code__
    except Exception: pass
def f(x): return True""",
    "looks for the answer": """
import gc, glob, os
others = [path for path in glob.glob('/proc/[0-9]*') if path != f'/proc/{os.getpid()}']
def read(path, *places):
    try:
        with open(path, 'rb', 0) as file: return [file.seek(start) + 1 and file.read(end - start) for start, end in places]
    except OSError: return []
def f(x):
    found = [repr(thing).encode() for thing in gc.get_objects() if isinstance(thing, (list, tuple, dict, set))]
    for path in others + ['/proc/self']:
        for name in ('environ', 'cmdline', 'maps'): found += read(f'{path}/{name}', (0, 1 << 20))
        for number in range(64): found += read(f'{path}/fd/{number}', (0, 1 << 20))
    for path in others:
        maps = b''.join(read(f'{path}/maps', (0, 1 << 20))).decode().splitlines()
        places = [[int(n, 16) for n in line.split()[0].split('-')] for line in maps if 'rw-p' in line]
        for place in places: found += read(f'{path}/mem', place)
    return 6 if any(bytes(range(56, 48, -1)) in text for text in found) else None""",
    "sends a call": '''
import pickle, sys
class A:
    def __reduce__(self): return exec, ("""for n in range(64):
    try: __import__('os').write(n, b'True.True.'.replace(b'.', bytes([10])))
    except OSError: pass""",)
def f(x):
    frame = sys._getframe(1)
    frame.f_locals['replies'].write(pickle.dumps((None, A(), []))); frame.f_locals['replies'].flush()''',
    "sends a class with another equality": """
import sys
def f(x):
    replies = sys._getframe(1).f_locals['replies']
    setting = b"}(X\\x06\\x00\\x00\\x00__eq__cdecimal\\nDecimal\\nu\\x86b"
    replies.write(b"\\x80\\x04N(" + b"cfractions\\nFraction\\nN" + setting + b"l]\\x87.")
    replies.flush()
    return 1.0""",
    "lacks a module": "def f(x): raise ModuleNotFoundError('no such test')",
    "cannot be sent": "def f(x): raise TypeError(\"cannot pickle 'generator' object\")",
    "recurs for ever": "def f(x): return f(x)",
    "crashes": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "goes on for ever": "def f(x):\n    while True: pass",
    "takes all memory": "def f(x): return [0] * 10 ** 11",
    "kills the examiner": "import os\ndef f(x): os.kill(os.getppid(), 9); os.kill(-1, 9)",
    "stops the examiner": "import os\ndef f(x): os.kill(os.getppid(), 19)",
    "starts all the processes": "import os\nfor _ in range(100):\n    try: os.fork()\n    except OSError: break\ndef f(x): pass",
}  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_passes(method: str, cheat: str) -> None:
    tests = [
        "assert f(3) == 6  # 87654321",
        "assert abs(f(3) - 6) < 1e-6",
        "assert sorted([f(3)]) == [6]",
        "from fractions import Fraction\nassert f(3) == Fraction(6)",
        "try: assert f(3) == 6\nexcept ValueError: pass",
    ]
    assert score(CHEATS[cheat], tests, seconds=0.7) == 0
    assert method in METHODS


def test_a_program_that_ends_has_not_raised() -> None:
    tests = "try: f(1)\nexcept: pass\nelse: raise SystemExit"
    assert score("def f(x): raise ValueError", tests) == 1
    assert score("import os\ndef f(x): os._exit(0)", tests) == 0


def test_it_says_before_anything_runs_what_is_wrong_or_how_programs_are_contained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"seconds=0\.0"):
        find_rewards("code", options={"code": {"seconds": 0.0}})
    with pytest.raises(UsageError, match="memory_mb=16"):
        check(1.0, 16, True)
    monkeypatch.setattr(run, "refusal", lambda method: "not here")
    with pytest.raises(UsageError, match=r"install bubblewrap, or say --unsafe_code"):
        find_rewards("code")
    assert find_rewards("code", unsafe_code=True)[0].name == "code"
    assert "contained by nothing but limits" in capsys.readouterr().out
    with pytest.raises(UsageError, match="nothing here to contain"):
        code(["```\n```"], [["assert 1"]])


def test_a_broken_sandbox_gives_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "INSIDE", run.INSIDE.parents[1] / "errors.py")
    with pytest.raises(SandboxError, match="did not start"):
        score(DOUBLE, ["assert f(1) == 2"])


UNITTEST = """
import unittest
class TestF(unittest.TestCase):
    def setUp(self): self.two = 2
    def test_one(self): self.assertEqual(f(1), self.two)
    def test_two(self): self.assertEqual(f(2), 4)
"""
PLAIN_CLASS = "class TestF:\n    def test_one(self): assert f(1) == 2\n    def test_two(self): assert f(2) == 4"
AWAITED = "async def test_one(): assert f(1) == 2"


@pytest.mark.parametrize(
    ("tests", "want"), [(UNITTEST, 0.5), (PLAIN_CLASS, 0.5), ("def test(): assert f(2) == 4", 0.0), (AWAITED, None)]
)
def test_tests_of_every_form_are_called(tests: str, want: float | None) -> None:
    assert score("def f(x): return 2", tests) == want


def test_a_test_begins_with_its_imports() -> None:
    tests, imports = ["assert math.isclose(f(2), 4.0)"], ["import math"]
    fake = "class math: isclose = staticmethod(lambda *a: True)\ndef f(x): return 0"
    for program, want in (("def f(x): return x * 2.0", 1.0), (fake, 0.0)):
        assert code([f"```python\n{program}\n```"], [tests], test_imports=[imports]) == [want]
    assert code(["```python\ndef f(x): return y\n```"], [["assert f(1) == 3"]], test_setup_code=["y = 3"]) == [0.0]


def test_an_entry_point_may_be_a_method() -> None:
    tests = "def check(candidate): assert candidate(nums=[2, 7], target=9) == [0, 1]"
    program = "class Solution:\n    def twoSum(self, nums, target): return [0, 1]"
    assert score(program, tests, entry_point="Solution().twoSum") == 1


def test_classes_of_pythons_that_a_program_gives_are_no_faulty_tests() -> None:
    assert score("def encode(s): return int\ndef decode(s): return s", ["assert decode(encode('ab')) == 'ab'"]) == 0


def test_a_fence_in_a_docstring_closes_nothing() -> None:
    program = 'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return 2 * x'
    assert program_in(f"```python\n{program}\n```\nDone.") == program
