"""Reward functions: found, called with what they ask for, and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanorlhf.errors import RewardError, UsageError
from nanorlhf.scoring import find_rewards, score
from nanorlhf.types import Prompt, Sample
from tests.samples import snippet


def samples(*texts: str, conversational: bool = False) -> list[Sample]:
    prompt: Any = [{"role": "user", "content": "1+1="}] if conversational else "1+1="
    return [
        Sample(Prompt(i, [1], prompt, {"answer": "2", "level": i}), [5, 6], [0.0, 0.0], True, t)
        for i, t in enumerate(texts)
    ]


def test_exact_answer() -> None:
    texts = [
        "<answer>2</answer>",
        "<answer> 2 </answer>",
        "2",
        "<answer>3</answer>",
        "<answer>2</answer><answer>3</answer>",
        "<answer>2",
    ]
    batch = samples(*texts)
    score(find_rewards("exact_answer"), batch)
    assert [s.reward for s in batch] == [1, 1, 0, 0, 0, 0]


def test_functions_get_columns_and_only_what_they_ask_for() -> None:
    def picky(level: list[int]) -> list[float]:
        return [float(n) for n in level]

    def greedy(prompts: list[str], completions: list[Any], **columns: Any) -> list[float]:
        assert set(columns) == {"answer", "level", "completion_ids"}
        assert completions[0] == [{"role": "assistant", "content": "a"}]
        return [10.0] * len(prompts)

    async def later(completion_ids: list[list[int]]) -> list[float]:
        return [100.0 * len(ids) for ids in completion_ids]

    batch = samples("a", "b", conversational=True)
    score(find_rewards([picky, greedy, later], [1.0, 2.0, 0.5]), batch)
    assert [s.reward for s in batch] == [0 + 20 + 100, 1 + 20 + 100]
    assert batch[1].rewards == {"picky": 1, "greedy": 10, "later": 200}


def test_none_leaves_the_term_out_and_is_never_zero() -> None:
    def half(answer: list[str]) -> list[float | None]:
        return [1.0, None][: len(answer)]

    def never(answer: list[str]) -> list[None]:
        return [None for _ in answer]

    batch = samples("a", "b")
    score(find_rewards([half, never]), batch)
    assert [s.reward for s in batch] == [1.0, None]


@pytest.mark.parametrize("value", ["a word", float("nan"), float("inf"), [1.0]])
def test_what_is_no_number_stops_with_name_and_example(value: Any) -> None:
    def bad(answer: list[str]) -> list[Any]:
        return [0.5, value][: len(answer)]

    with pytest.raises(RewardError, match=r"(?s)reward 'bad' returned.*prompt: '1\+1='.*completion: 'second'"):
        score(find_rewards(bad), samples("first", "second"))


def test_a_reward_that_raises_names_the_completion_that_made_it() -> None:
    def brittle(completions: list[str]) -> list[float]:
        return [float(text) for text in completions]

    with pytest.raises(RewardError, match=r"(?s)reward 'brittle' raised ValueError.*completion: 'two'"):
        score(find_rewards(brittle), samples("1", "two", "3"))


def test_wrong_count() -> None:
    with pytest.raises(RewardError, match="returned 1 scores for 2 completions"):
        score(find_rewards(lambda completions: [1.0]), samples("a", "b"))


def test_a_function_from_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "rewards.py"  # the name of the package's own folder: nothing may break
    mine.write_text("def short(completions, **_):\n    return [-len(c) for c in completions]\n")
    batch = samples("abc")
    score(find_rewards([f"{mine}:short", "exact_answer"]), batch)
    assert batch[0].rewards == {"short": -3, "exact_answer": 0}
    with pytest.raises(UsageError, match="did you mean 'short'"):
        find_rewards(f"{mine}:shrt")
    with pytest.raises(UsageError, match="there is no file"):
        find_rewards("nowhere.py:f")


def test_options_reach_their_reward_and_no_column_replaces_them() -> None:
    def steep(level: list[int], *, slope: float = 1.0, answer: str = "") -> list[float]:
        return [slope * n + len(answer) for n in level]

    batch = samples("a", "b")
    score(find_rewards([steep, "exact_answer"], None, {"steep": {"slope": 3, "answer": "four"}}), batch)
    assert [s.rewards["steep"] for s in batch] == [4, 7]
    with pytest.raises(UsageError, match="'steep' has no option 'slop'; did you mean 'slope'"):
        find_rewards(steep, None, {"steep": {"slop": 3}})
    with pytest.raises(UsageError, match="no option 'level'"):
        find_rewards(steep, None, {"steep": {"level": 3}})
    with pytest.raises(UsageError, match="did you mean 'steep'"):
        find_rewards(steep, None, {"step": {"slope": 3}})


def test_at_the_door() -> None:
    with pytest.raises(UsageError, match="did you mean 'exact_answer'"):
        find_rewards("exact_answers")
    with pytest.raises(UsageError, match="each takes one weight"):
        find_rewards(["exact_answer"], [1.0, 2.0])
    with pytest.raises(UsageError, match="name of its own"):
        find_rewards(["exact_answer", "exact_answer"])
    with pytest.raises(UsageError, match="no reward"):
        find_rewards([])
    assert find_rewards("exact_answer")[0].missing(["prompt"]) == ["answer"]


def test_the_readmes_reward_scores_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(snippet("mine.py"))
    texts = ["it is 84", "12 * 7 = 80", "no idea", "84"]
    batch = [
        Sample(Prompt(0, [1], "?", {"target": t}), [5], [0.0], True, x)
        for x, t in zip(texts, [84, 84, 84, None], strict=True)
    ]
    score(find_rewards(f"{tmp_path}/mine.py:near"), batch)
    assert [s.reward for s in batch] == [1, 0.2, 0, None]
