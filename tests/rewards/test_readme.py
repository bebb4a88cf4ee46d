"""The page on rewards names every reward with its columns, options and defaults, and its example runs."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanorlhf.scoring.reward import find_rewards, known_rewards

PAGE = (Path(__file__).parents[2] / "rewards" / "README.md").read_text()
ROW = re.compile(r"^\| \[`(\w+)(?::NAME)?`\]\((\w+)\.py\) \|(.*)\|(.*)\|.*\|$", re.MULTILINE)
OPTION = re.compile(r"`(\w+)`(?: \(([^)]+)\))?")
GIVEN = {"completions", "completion_ids", "prompts"}


def described() -> dict[str, tuple[set[str], dict[str, Any]]]:
    """Columns and options by reward, as the table has them."""
    found = {}
    for name, file, columns, options in ROW.findall(PAGE):
        assert name == file
        defaults = {option: yaml.safe_load(default or "null") for option, default in OPTION.findall(options)}
        found[name] = (set(re.findall(r"`(\w+)`", columns)), defaults)
    return found


def test_it_names_every_reward() -> None:
    assert set(described()) == set(known_rewards())


@pytest.mark.parametrize("name", sorted(set(known_rewards()) - {"model"}))
def test_columns_and_options_are_the_functions(name: str) -> None:
    function = getattr(importlib.import_module(f"nanorlhf.rewards.{name}"), name)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = {p.name: p.default or None for p in parameters if p.kind is p.KEYWORD_ONLY}
    columns, said = described()[name]
    assert {option: default or None for option, default in said.items()} == options
    assert {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY} - GIVEN <= columns


def test_the_example_is_a_reward(tmp_path: Path) -> None:
    code = re.search(r"```python\n(# shout\.py\n.*?)```", PAGE, re.DOTALL)
    assert code
    (tmp_path / "shout.py").write_text(code[1])
    reward = find_rewards(f"{tmp_path}/shout.py:shout", None, {"shout": {"most": 0.2}})[0]
    said = ["quiet", "LOUD", "a Bit of both", [{"role": "assistant", "content": "NO"}], ""]
    assert reward.function(completions=said) == [1, 0, 1, 0, 1]
