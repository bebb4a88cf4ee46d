"""Files that users bring."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nanorlhf.system.user_code import from_file

MINE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Point:
    x: int

def near(completions):
    return [Point(1).x for _ in completions]
"""


def test_a_file_may_hold_dataclasses_and_is_no_module_afterwards(tmp_path: Path) -> None:
    (tmp_path / "points_of_mine.py").write_text(MINE)
    assert from_file(f"{tmp_path}/points_of_mine.py:near")(["a"]) == [1]
    assert "points_of_mine" not in sys.modules


def test_a_file_does_not_take_the_place_of_a_module_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("import json\ntext = json.dumps([1])\n")
    assert from_file(f"{tmp_path}/json.py:text") == "[1]"
    assert sys.modules["json"] is json
