"""Reasoning Gym's tasks as datasets: rows, splits that never meet, options, and mistakes answered early."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanorlhf.errors import UsageError
from nanorlhf.grpo.__main__ import main
from nanorlhf.rewards.reasoning import reasoning
from nanorlhf.tasks.reasoning_gym import OURS, read_options, reasoning_gym_dataset, registry

SMALL = "{size: 40, test_size: 10}"
RECIPES = sorted((Path(__file__).parents[2] / "grpo" / "recipes").glob("gym_*.yaml"))


def questions(*arguments: Any) -> list[str]:
    return [prompt[0]["content"] for prompt in reasoning_gym_dataset(*arguments)["prompt"]]


def test_a_row_is_a_question_its_answer_and_what_judges_it() -> None:
    rows: Any = reasoning_gym_dataset("chain_sum", SMALL, "train")
    assert len(rows) == 40 and set(rows.column_names) == {"prompt", "answer", "entry", "completion"}
    entry = json.loads(rows[0]["entry"])
    assert rows[0]["prompt"] == [{"role": "user", "content": entry["question"]}]
    assert rows[0]["completion"] == [{"role": "assistant", "content": f"<answer>{entry['answer']}</answer>"}]
    assert rows[0]["answer"] == entry["answer"] and entry["metadata"]["source_dataset"] == "chain_sum"
    assert set(reasoning(rows["completion"][:], rows["entry"][:])) == {1}


def test_splits_never_meet_whatever_the_seed() -> None:
    few = "{min_terms: 2, max_terms: 2, max_digits: 1, size: 500, test_size: 500, seed: %d}"
    train = [questions("chain_sum", few % seed, "train") for seed in (0, 7)]
    test = [questions("chain_sum", few % seed, "test") for seed in (0, 7)]
    for found in (*train, *test):
        assert len(set(found)) == len(found)
    assert not set(train[0] + train[1]) & set(test[0] + test[1])
    assert train[0] != train[1]
    assert len(train[0]) + len(test[0]) <= 200  # all that one digit and two signs can ask


def test_the_same_options_give_the_same_rows_and_a_longer_set_begins_alike() -> None:
    assert questions("gcd", SMALL, "test") == questions("gcd", SMALL, "test")
    assert questions("gcd", "{size: 60}", "train")[:40] == questions("gcd", SMALL, "train")


def test_a_tasks_own_options_reach_it_and_its_scorer() -> None:
    rows: Any = reasoning_gym_dataset("spell_backward", "{min_word_len: 3, max_word_len: 3, size: 20}", "train")
    assert {len(answer) for answer in rows["answer"]} == {3}
    twins = [
        json.loads(reasoning_gym_dataset("puzzle24", f"{{size: 1, max_value: {n}}}", "train")[0]["entry"])
        for n in (9, 10)
    ]
    twins = [{**entry, "metadata": twins[0]["metadata"]} for entry in twins]
    answer = "<answer>10 + 10 + 2 + 2</answer>"  # the task looks only at what numbers may be
    assert reasoning([answer] * 2, [json.dumps(entry) for entry in twins]) == [0.01, 1]


def test_tasks_without_one_answer_and_tasks_of_tasks() -> None:
    rows: Any = reasoning_gym_dataset("graph_color", "{size: 3}", "train")
    assert rows.column_names == ["prompt", "entry"]
    mixed = "{size: 30, datasets: [{name: gcd}, {name: chain_sum, weight: 2.0, config: {max_terms: 2}}]}"
    rows = reasoning_gym_dataset("composite", mixed, "train")
    assert {json.loads(entry)["metadata"]["source_dataset"] for entry in rows["entry"]} == {"gcd", "chain_sum"}
    assert set(reasoning(rows["completion"][:], rows["entry"][:])) == {1}


@pytest.mark.parametrize(
    ("task", "config", "split", "complaint"),
    [
        ("chain_sums", None, "train", "no task 'chain_sums'; did you mean 'chain_sum'"),
        ("", None, "train", "no task ''"),
        ("chain_sum", None, "validation", "choose 'train' or 'test'"),
        ("chain_sum", "{max_term: 2}", "train", "no option 'max_term'; did you mean 'max_terms'"),
        ("chain_sum", "{sizes: 2}", "train", "did you mean 'size'"),
        ("chain_sum", "{size: 0}", "train", "size=0 must be a whole number, above 0"),
        ("chain_sum", "{test_size: many}", "test", "test_size='many'"),
        ("chain_sum", "{seed: 1.5}", "test", "seed=1.5"),
        ("chain_sum", "{max_terms: 0}", "train", "chain_sum refuses"),
        ("chain_sum", "{max_terms: two}", "train", "chain_sum refuses"),
        ("composite", None, "train", "composite refuses"),
        ("composite", "{datasets: [{name: gdc}]}", "train", "gdc"),
        ("chain_sum", "main", "train", "must be options"),
        ("chain_sum", "{size: ", "train", "is no YAML"),
    ],
)
def test_wrong_settings_are_refused_early(task: str, config: str | None, split: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        reasoning_gym_dataset(task, config, split)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(UsageError, match="pip install reasoning-gym"):
        reasoning_gym_dataset("chain_sum", None, "train")


def test_options_have_defaults() -> None:
    assert read_options("gcd", None) == read_options("gcd", "") == OURS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_train_with_nothing_but_options(recipe: Path, tmp_path: Path) -> None:
    said = yaml.safe_load(recipe.read_text())
    assert recipe.stem == "gym_" + said["dataset_name"].removeprefix("reasoning_gym:")
    sizes = {**yaml.safe_load(said.get("dataset_config", "{}")), "size": 24, "test_size": 4}
    options: dict[str, Any] = {
        "recipe": recipe.stem, "model_name_or_path": "nanorlhf:adder", "engine": "hf", "device": "cpu",
        "dataset_config": json.dumps(sizes), "max_prompt_length": 384, "max_completion_length": 8, "max_steps": 2,
        "prompts_per_step": 2, "num_generations": 2, "eval_prompts": 2, "eval_steps": 0, "reward_workers": 0,
        "output_dir": tmp_path / "run",
    }  # fmt: skip
    assert main([word for name, value in options.items() for word in (f"--{name}", str(value))]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(0 <= row["eval/reward"] <= 1 for row in (rows[0], rows[-1]))


def test_there_are_five_recipes() -> None:
    assert len(RECIPES) == 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what a generator does in numpy is its own affair
@pytest.mark.parametrize("task", sorted(registry().keys() - {"composite"}))
def test_every_task_makes_rows_that_its_own_answers_solve(task: str) -> None:
    rows: Any = reasoning_gym_dataset(task, "{size: 6, test_size: 1}", "train")
    assert len(rows) == 6
    if "answer" in rows.column_names:
        scores = reasoning(rows["completion"][:], rows["entry"][:])
        unsolved = [("Integral(" in answer) for answer in rows["answer"]]  # such "answers" restate the question
        assert [score == 1 for score in scores] == [not restated for restated in unsolved]
