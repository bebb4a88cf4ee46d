"""The share of its unit tests that a completion's program passes, in a sandbox."""

from __future__ import annotations

import json
import marshal
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanorlhf.data.answers import last_tagged, text_of
from nanorlhf.errors import UsageError
from nanorlhf.sandbox import run
from nanorlhf.sandbox.run import Limits
from nanorlhf.system.terminal import log

EXAMINER = Path(run.__file__).with_name("examiner.py")
PYTHON = {"python", "py", "python3"}
FORMS = (
    "a list of assert statements, one text of tests (with an `entry_point` column where it defines `check`), a list of "
    '{"input": ..., "output": ...}, {"inputs": [...], "outputs": [...]}, or any of these as JSON'
)


def code(
    completions: list[Any],
    tests: list[Any],
    entry_point: Sequence[str | None] | None = None,
    test_imports: Sequence[Any] | None = None,
    test_setup_code: Sequence[Any] | None = None,
    *,
    all_or_nothing: bool = False,
    seconds: float = 5.0,
    memory_mb: int = 1024,
    unsafe_code: bool = False,
    **_: Any,
) -> list[float | None]:
    """Runs each completion's program on its row's tests, for `seconds` at most; None if the row has no tests."""
    method, limits = run.find_method(unsafe_code), Limits(seconds=seconds, memory_mb=memory_mb)
    scores: list[float | None] = []
    none = [None] * len(tests)
    columns = zip(entry_point or none, test_imports or none, test_setup_code or none, strict=True)
    for completion, row, (entry, imports, first) in zip(completions, tests, columns, strict=True):
        exam = read_tests(row, entry, "\n".join(filter(None, [as_text(imports or ""), first])))
        program = program_in(text_of(completion))
        if exam is None or program is None:
            scores.append(None if exam is None else 0.0)
            continue
        passed = exam.results(program, limits, method)
        share = sum(passed) / len(passed) if passed else None
        scores.append(float(share == 1) if all_or_nothing and share is not None else share)
    return scores


def check(seconds: float, memory_mb: int, unsafe_code: bool, **_: Any) -> None:
    """Refuses limits that no program could keep, and machines that cannot contain a program; says what contains it."""
    if seconds <= 0:
        raise UsageError(f"reward_options: code has seconds={seconds}: every program needs some; 5 is the default")
    if memory_mb < 64:
        raise UsageError(f"reward_options: code has memory_mb={memory_mb}: Python itself needs 64; 1024 is the default")
    log.info(f"programs of the model are contained by {run.WORDS[run.find_method(unsafe_code)]}")


@dataclass(frozen=True, slots=True)
class Texts:
    """Tests that are Python."""

    texts: Sequence[str]
    entry_point: str | None

    def results(self, program: str, limits: Limits, method: str) -> list[bool]:
        """Of each test whether it passed, but those that no program could be asked; what was not reached has failed."""
        tests = {"texts": list(self.texts), "entry_point": self.entry_point}
        said = examine("t", program, tests, limits, method)
        planned = [int(line.split()[1]) for line in said if line.startswith("cases")]
        found = [line for line in said if not line.startswith("cases")]
        missing = sum(planned) + len(self.texts) - len(planned) - len(found)
        return [line == "True" for line in found if line != "None"] + [False] * missing


@dataclass(frozen=True, slots=True)
class Pairs:
    """Inputs for stdin, and the outputs that are wanted."""

    inputs: list[str]
    outputs: list[str]

    def results(self, program: str, limits: Limits, method: str) -> list[bool]:
        """Of each pair whether the program ends well, and writes what is wanted, white space at ends of lines aside."""
        largest = 2 * max(len(output.encode()) for output in self.outputs) + 1024
        limits = replace(limits, output_kb=2 * largest * len(self.inputs) // 1024 + 64)  # it comes in hexadecimal
        tests = {"inputs": self.inputs, "largest": largest}
        right = []
        for line, wanted in zip(examine("p", program, tests, limits, method), self.outputs, strict=False):
            status, written = line.split(" ")
            right.append(status == "0" and trimmed(bytes.fromhex(written).decode(errors="replace")) == trimmed(wanted))
        return right + [False] * (len(self.outputs) - len(right))


def examine(kind: str, program: str, tests: dict[str, Any], limits: Limits, method: str) -> list[str]:
    """The examiner's output in the sandbox, line by line, as far as it got."""
    source, asked = program.encode(errors="replace"), marshal.dumps(tests, 4)
    stdin = f"{kind}{len(source):012}{len(asked):012}".encode() + source + asked
    return run.run(EXAMINER.read_text(), stdin, limits=limits, method=method).stdout.splitlines()


def trimmed(text: str) -> list[str]:
    """Its lines, without white space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def read_tests(row: Any, entry_point: str | None = None, setup: str = "") -> Texts | Pairs | None:
    """A row's tests in whichever of the usual forms; None if there are none."""
    if isinstance(row, str) and row.lstrip()[:1] in {"[", "{"}:
        with suppress(ValueError):  # then it is Python
            row = json.loads(row)
    if row is None or row in ("", [], {}):
        return None
    if isinstance(row, str):
        return Texts([f"{setup}\n{row}"], entry_point)
    tests = in_pairs(row) if isinstance(row, dict) else row
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        return Texts([f"{setup}\n{tests[0]}", *tests[1:]], entry_point)  # which share a namespace
    if isinstance(tests, list) and all(isinstance(test, dict) and test.keys() >= {"input", "output"} for test in tests):
        return Pairs([as_text(test["input"]) for test in tests], [as_text(test["output"]) for test in tests])
    raise ValueError(f"these tests are in no known form: {str(row)[:200]}; known are {FORMS}")


def in_pairs(row: dict[str, Any]) -> list[Any] | None:
    """A row of inputs and one of outputs as one row of pairs; None if they are none."""
    inputs, outputs = (row.get(f"{name}s", row.get(name)) for name in ("input", "output"))
    if row.get("fn_name") or type(inputs) is not type(outputs):
        return None
    if isinstance(inputs, str):
        inputs, outputs = [inputs], [outputs]
    if not isinstance(inputs, list) or len(inputs) != len(outputs or []):
        return None
    return [{"input": given, "output": wanted} for given, wanted in zip(inputs, outputs or [], strict=True)]


def as_text(value: Any) -> str:
    """The contents of a file, which is given as text or as lines of it."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def program_in(text: str) -> str | None:
    """The last block of Python in a completion, else its last block of anything, else what answer tags hold."""
    fenced = list(blocks(text))
    python = [block for language, block in fenced if language in PYTHON]
    return (python or [block for _, block in fenced] or [last_tagged(text)])[-1]


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Each fenced block that is closed: its language, and its text."""
    language, lines, deep = None, [], 0
    for line in text.splitlines():
        mark, indent = line.strip(), len(line) - len(line.lstrip())
        if language is None and mark.startswith("```") and "`" not in mark.lstrip("`"):  # which would be code in a line
            language, lines, deep = (mark.strip("`").split() or [""])[0].lower(), [], indent + 4
        elif language is not None and len(mark) >= 3 and not mark.strip("`") and indent < deep:  # not in a docstring
            yield language, textwrap.dedent("\n".join(lines))
            language = None
        elif language is not None:
            lines.append(line)
