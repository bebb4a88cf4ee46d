"""Reward functions: found by name or in a file, with their options, and refused before anything is loaded."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from nanorlhf.errors import UsageError
from nanorlhf.scoring.reward import defaults_of, find_rewards, judge, known_rewards


def test_a_function_from_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "rewards.py"  # the name of the package's own folder: nothing may break
    mine.write_text("def short(completions, **_):\n    return [-len(c) for c in completions]\n")
    short, exact = find_rewards([f"{mine}:short", "exact_answer"])
    arguments = {"completions": ["abc"], "answer": ["2"]}
    assert (judge(short, arguments, 1).scores, judge(exact, arguments, 1).scores) == ([-3], [0])
    with pytest.raises(UsageError, match="did you mean 'short'"):
        find_rewards(f"{mine}:shrt")
    with pytest.raises(UsageError, match="there is no file"):
        find_rewards("nowhere.py:f")


def test_options_reach_their_reward_and_no_column_replaces_them() -> None:
    def steep(level: list[int], *, slope: float = 1.0, answer: str = "") -> list[float]:
        return [slope * n + len(answer) for n in level]

    (reward,) = find_rewards([steep], None, {"steep": {"slope": 3, "answer": "four"}})
    assert judge(reward, {"level": [0, 1], "answer": ["2", "2"]}, 2).scores == [4, 7]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steep": {"slop": 3}}, "'steep' has no option 'slop'; did you mean 'slope'"),
        ({"steep": {"level": 3}}, "no option 'level'"),
        ({"steep": {"slope": "3"}}, "slope='3' of 'steep' is of the wrong type: it takes float"),
        ({"steep": {"slope": True}}, "slope=True of 'steep' is of the wrong type"),
        ({"steep": {"answer": 3}}, "answer=3 of 'steep' is of the wrong type: it takes str"),
        ({"step": {"slope": 3}}, "did you mean 'steep'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    def steep(level: list[int], *, slope: float = 1.0, answer: str = "") -> list[float]:
        return [slope * n + len(answer) for n in level]

    with pytest.raises(UsageError, match=words):
        find_rewards(steep, None, options)


def test_a_reward_that_reads_nothing_but_tokens_is_found_by_its_name() -> None:
    (length,) = find_rewards("length", None, {"length": {"max": 2, "slack": 4}})
    assert judge(length, {"completions": ["a", "b"], "completion_ids": [[1, 2], [1, 2, 3]]}, 2).scores == [0, -0.25]


@pytest.mark.parametrize("name", [name for name in known_rewards() if name != "model"])
def test_an_option_of_another_type_is_refused_before_its_reward_looks_at_it(name: str) -> None:
    for option, default in defaults_of(getattr(import_module(f"nanorlhf.rewards.{name}"), name)).items():
        wrong = 5 if isinstance(default, bool | str) else "5"
        if default is not None:
            with pytest.raises(UsageError, match=f"{option}={wrong!r} of '{name}' is of the wrong type"):
                find_rewards(name, None, {name: {option: wrong}})


def test_wrong_settings_are_refused_early() -> None:
    with pytest.raises(UsageError, match="did you mean 'exact_answer'"):
        find_rewards("exact_answers")
    with pytest.raises(UsageError, match="takes no :x"):
        find_rewards("exact_answer:x")
    with pytest.raises(UsageError, match="say model:WHICH"):
        find_rewards("model")
    with pytest.raises(UsageError, match="each takes one weight"):
        find_rewards(["exact_answer"], [1.0, 2.0])
    with pytest.raises(UsageError, match="name of its own"):
        find_rewards(["exact_answer", "exact_answer"])
    with pytest.raises(UsageError, match="no reward"):
        find_rewards([])
    assert find_rewards("exact_answer")[0].missing(["prompt"]) == ["answer"]
