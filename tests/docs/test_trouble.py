"""Every warning and error of the code has a line on the page of trouble, and every line there has one in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from nanorlhf.records.diagnosis import ADVICE, CHECKS
from tests.docs.pages import ROOT
from tests.test_structure import sources

PAGE = (ROOT / "docs" / "trouble.md").read_text()
ERRORS = ("UsageError", "RunError", "RewardError", "UnsupportedModelError", "TooLongError", "LostError", "log.warning")
LINES = re.findall(r"^(?:\| )?`([^`]+)`(?: \|.*)?$", PAGE, re.MULTILINE)
AROUND = {"… (try …)", "…; the report is …", "…; go on with --resume …"}  # another message, which is here itself


def said(node: ast.AST) -> list[str]:
    """The texts that an expression may come to, with an ellipsis for what is filled in."""
    match node:
        case ast.Constant(value=str() as text):
            return [text]
        case ast.JoinedStr(values=values):
            return ["".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in values)]
        case ast.BinOp(left=left, right=right):
            return [a + b for a in said(left) for b in said(right)] or ["…"]
        case ast.IfExp(body=body, orelse=orelse):
            return said(body) + said(orelse)
    return ["…"]


def messages(path: Path) -> list[str]:
    """The texts of a file's warnings and errors."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args]
    return [text for call in calls if ast.unparse(call.func) in ERRORS for text in said(call.args[0])]


def returned(path: Path, functions: set[str]) -> list[str]:
    """The texts that these functions of a file return."""
    defined = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    returns = [n for f in defined if f.name in functions for n in ast.walk(f) if isinstance(n, ast.Return) and n.value]
    return [text for n in returns if n.value for text in said(n.value) if text.strip("…")]


def pattern(line: str) -> re.Pattern[str]:
    """A line of the page, whose ellipses stand for anything."""
    return re.compile(".*".join(map(re.escape, line.split("…"))), re.DOTALL)


CODE = ROOT / "nanorlhf"
ALL = {text for path in sources() if "evidence" not in path.parts for text in messages(path)}
ALL |= {
    *returned(CODE / "records" / "diagnosis.py", {*CHECKS}),
    *returned(CODE / "scoring" / "scorer.py", {"described"}),
}
ALL |= {*returned(CODE / "types.py", {"words"}), *returned(CODE / "engines" / "vllm.py", {"check_version"})}
ALL = {text for text in ALL - AROUND if re.search(r"[a-z]", text)}


def test_every_message_has_a_line() -> None:
    lines = [pattern(line) for line in LINES]
    assert [text for text in sorted(ALL) if not any(line.fullmatch(text) for line in lines)] == []


def test_every_line_has_a_message() -> None:
    assert [line for line in LINES if not any(pattern(line).fullmatch(text) for text in ALL)] == []


def test_every_diagnosis_has_a_section_with_its_advice() -> None:
    for kind, advice in ADVICE.items():
        section = re.search(rf"^### {kind}\n(.*?)^##", PAGE, re.MULTILINE | re.DOTALL)
        assert section, f"no section {kind}"
        for name in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", advice):
            assert f"`{name}" in section[1], f"{kind}: {name}"
