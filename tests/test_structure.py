"""The rules of the house: which way imports go, which libraries have one door, and what a command loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf.__main__ import ALGORITHMS, SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("nanorlhf", "rewards", "algorithms", "scripts", "evidence")  # each may import those before it, and itself
DOORS = {
    "vllm": "nanorlhf/engines/vllm.py",
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


def test_the_rule_itself() -> None:
    assert may_import("scripts", "grpo") and may_import("grpo", "rewards") and may_import("rewards", "nanorlhf")
    assert (
        not may_import("nanorlhf", "rewards")
        and not may_import("rewards", "grpo")
        and not may_import("grpo", "scripts")
    )


@pytest.mark.parametrize(("library", "door"), DOORS.items())
def test_one_door(library: str, door: str) -> None:
    users = [str(p.relative_to(ROOT)) for p in sources() if library in {m.split(".")[0] for m in imports(p)}]
    assert users and all(user.startswith(door) for user in users)


def test_trackers_have_the_same_door() -> None:
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
    ],
)
def test_nothing_heavy_before_it_is_needed(code: str) -> None:
    exits = f"try:\n    {code}\nexcept SystemExit as end:\n    assert not end.code\n"
    check = (
        "import sys; heavy = {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    ended = subprocess.run([sys.executable, "-c", exits + check], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
