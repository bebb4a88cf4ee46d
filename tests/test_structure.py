"""The rules of the code: which way imports go, which libraries have one importer, and what a command loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf.__main__ import ALGORITHMS, SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (  # of the core: each imports only those that stand below it
    ("cli",),
    ("trainer",),
    ("assembly",),
    ("loop", "evaluation", "engine_check"),
    ("rollouts", "preflight"),
    ("scoring",),
    ("memory", "environments"),
    ("learning", "engines"),
    ("policy",),
    ("records", "data", "algorithm"),
    ("config", "__main__"),
    ("system", "tasks", "sandbox", "formulas"),
    ("types",),
    ("segments", "errors"),
)
LAYERS = ("nanorlhf", "rewards", "algorithms", "scripts", "evidence")  # each may import those before it, and itself
IMPORTERS = {
    "vllm": "nanorlhf/engines/vllm",
    "peft": "nanorlhf/policy/",
    "wandb": "nanorlhf/records/tracking.py",
    "reasoning_gym": "nanorlhf/tasks/reasoning_gym.py",
}


def sources() -> list[Path]:
    return [
        p
        for folder in ("nanorlhf", "rewards", *ALGORITHMS, "scripts", "evidence")
        for p in sorted((ROOT / folder).rglob("*.py"))
    ]


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def folder_of(module: str) -> str:
    """The folder of a module: `nanorlhf.grpo.config` lies in grpo, `nanorlhf.config.option` in nanorlhf."""
    parts = module.split(".")
    if parts[0] == "evidence":
        return "evidence"
    return parts[1] if len(parts) > 1 and parts[1] in (*ALGORITHMS, "rewards", "scripts") else "nanorlhf"


def may_import(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    rank = {folder: LAYERS.index("algorithms" if folder in ALGORITHMS else folder) for folder in (importer, imported)}
    return rank[imported] < rank[importer]


def wrong_imports(path: Path) -> list[str]:
    importer = path.relative_to(ROOT).parts[0]
    ours = [m for m in imports(path) if m.split(".")[0] in ("nanorlhf", "evidence", "rewards", "scripts", *ALGORITHMS)]
    plain = [
        m for m in ours if not m.startswith(("nanorlhf", "evidence"))
    ]  # a folder's own name works in the checkout only
    return sorted(plain + [m for m in ours if not may_import(importer, folder_of(m))])


def test_imports_go_one_way() -> None:
    assert {str(p.relative_to(ROOT)): wrong for p in sources() if (wrong := wrong_imports(p))} == {}


def room_of(module: str) -> str:
    """The folder of the core, or the file beside it, that a module is: `nanorlhf.policy.lora` is in policy."""
    return module.split(".")[1] if "." in module else ""


def upward(path: Path) -> list[str]:
    """Imports of rooms that do not stand below a file's own."""
    rank = {name: number for number, names in enumerate(ROOMS) for name in names}
    own = path.relative_to(ROOT / "nanorlhf").with_suffix("").parts[0]
    if own == "__init__":
        return []
    rooms = {room_of(m) for m in imports(path) if m.startswith("nanorlhf.")} & rank.keys()
    return sorted(room for room in rooms if room != own and rank[room] <= rank[own])


def test_rooms_import_only_rooms_below_them() -> None:
    core = sorted((ROOT / "nanorlhf").rglob("*.py"))
    assert {str(p.relative_to(ROOT)): wrong for p in core if (wrong := upward(p))} == {}
    there = {p.stem if p.is_file() else p.name for p in (ROOT / "nanorlhf").iterdir() if not p.name.startswith("__p")}
    assert {name for names in ROOMS for name in names} == there - {"__init__", "models", "py"}  # py.typed


def test_the_core_is_small_enough_to_be_looked_over() -> None:
    assert len(list((ROOT / "nanorlhf").glob("*.py"))) <= 14
    core = {p: p.read_text() for p in (ROOT / "nanorlhf").rglob("*.py")}
    sizes = {str(p.relative_to(ROOT)): len(text.splitlines()) for p, text in core.items()}
    assert {name: lines for name, lines in sizes.items() if lines > 350} == {}
    functions = [
        (f"{p.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1)
        for p, text in core.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    ]
    assert [(name, lines) for name, lines in functions if lines > 50] == []


def test_the_reading_list_is_an_afternoons() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.findall(r"^\d+\. `([^`]+\.py)`", text, re.MULTILINE)
    assert len(listed) == len(set(listed)) >= 20
    assert sum(len((ROOT / name).read_text().splitlines()) for name in listed) <= 2200


PRIVATE = {"door", "cell", "guest", "voice", "team", "faults", "health", "rundir", "disk", "stage", "author", "taught"}
PRIVATE |= {"told", "freshen"}


def test_words_are_those_that_everybody_uses() -> None:
    """Names that outsiders do not guess have gone, and a docstring begins with a verb or a noun."""
    tests = [p for p in (ROOT / "tests").rglob("*.py") if "cuda_on_cpu" not in p.parts]
    defined = (ast.FunctionDef, ast.ClassDef)
    found = [f"{p.relative_to(ROOT)}: a file" for p in (*sources(), *tests) if p.stem in PRIVATE]
    for path in (*sources(), *tests):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, defined) and node.name.lower() in PRIVATE:
                found.append(f"{path.relative_to(ROOT)}: {node.name}")
            if isinstance(node, (*defined, ast.Module)) and re.match(
                r"(What|Who|Whoever|Where|How)\b", ast.get_docstring(node) or ""
            ):
                found.append(f"{path.relative_to(ROOT)}: {ast.get_docstring(node)}")
    assert found == []


def test_the_rule_itself() -> None:
    assert may_import("scripts", "grpo") and may_import("grpo", "rewards") and may_import("rewards", "nanorlhf")
    assert (
        not may_import("nanorlhf", "rewards")
        and not may_import("rewards", "grpo")
        and not may_import("grpo", "scripts")
    )


@pytest.mark.parametrize(("library", "importer"), IMPORTERS.items())
def test_one_importer(library: str, importer: str) -> None:
    users = [str(p.relative_to(ROOT)) for p in sources() if library in {m.split(".")[0] for m in imports(p)}]
    assert users and all(user.startswith(importer) for user in users)


def test_trackers_have_the_same_importer() -> None:
    users = [str(p.relative_to(ROOT)) for p in sources() if "accelerate.tracking" in imports(p)]
    assert users == ["nanorlhf/records/tracking.py"]


@pytest.mark.parametrize(
    "code",
    [
        "import nanorlhf.config.option",
        *(f"import nanorlhf.{name}" for name in ALGORITHMS),
        *(
            f"from nanorlhf.__main__ import main; assert main(['{name}', '--help']) == 0"
            for name in ALGORITHMS + SCRIPTS
        ),
        "from nanorlhf.__main__ import main; assert main(['--help']) == 0",
        "from nanorlhf.__main__ import main; assert main(['--version']) == 0",
    ],
)
def test_nothing_heavy_before_it_is_needed(code: str) -> None:
    exits = f"try:\n    {code}\nexcept SystemExit as end:\n    assert not end.code\n"
    check = (
        "import sys; heavy = {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    ended = subprocess.run([sys.executable, "-c", exits + check], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
