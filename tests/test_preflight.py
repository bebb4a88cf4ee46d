"""Names and what is loaded for them, and settings that are refused before anything is loaded."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any, cast

import datasets
import pytest

from nanorlhf import preflight
from nanorlhf.config.training import TrainConfig
from nanorlhf.data.sources import as_rows
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPO, GRPOConfig
from nanorlhf.policy import loading
from nanorlhf.ppo import PPO, PPOConfig
from nanorlhf.remax import ReMax, ReMaxConfig
from nanorlhf.rollouts.demonstrations import demonstration
from nanorlhf.scoring.reward import Reward, find_rewards
from nanorlhf.tasks.guessing import Guessing
from nanorlhf.types import Prompt, Sample

Call = tuple[str, str | None, str, bool]
ROW = {"question": "6*7?", "answer": "#### 42"}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls that load something, each of which gets a row."""
    calls: list[Call] = []

    def load(*call: Any) -> datasets.Dataset:
        calls.append(call)
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(preflight, "load", load)
    return calls


def enter(train: Any = None, rewards: list[Reward] | None = None, reader: Any = None, **options: Any) -> Any:
    return preflight.load_datasets(TrainConfig(**options), rewards or [], reader, train, None)


@pytest.mark.parametrize(
    ("options", "held_out"),
    [
        ({}, None),
        ({"dataset_test_split": "test"}, ("a/b", "main", "test", False)),
        ({"dataset_test_split": "test", "dataset_test_config": "x"}, ("a/b", "x", "test", False)),
        ({"dataset_test_name": "c/d"}, ("c/d", None, "test", False)),
        ({"dataset_test_name": "c/d", "dataset_test_config": "x", "dataset_test_split": "v"}, ("c/d", "x", "v", False)),
        ({"dataset_test_name": "c.jsonl"}, ("c.jsonl", None, "train", False)),
    ],
)
def test_which_datasets_are_loaded(options: dict[str, Any], held_out: Call | None, loaded: list[Call]) -> None:
    train, unseen = enter(dataset_name="a/b", dataset_config="main", **options)
    assert set(loaded) == {("a/b", "main", "train", False), *([held_out] if held_out else [])}
    assert train and (unseen is not None) == (held_out is not None)


def test_a_dataset_given_is_not_loaded(loaded: list[Call]) -> None:
    enter([ROW], dataset_test_split="test")
    assert loaded == []
    enter([ROW], dataset_name="a/b", dataset_test_split="test")
    assert loaded.pop() == ("a/b", None, "test", False), "but what it is held against is"
    enter([ROW], dataset_test_name="c/d", streaming=True)
    assert loaded == [("c/d", None, "test", True)]


def test_how_rows_are_read_is_said_where_they_have_names_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    enter([ROW])
    assert capsys.readouterr().out == "training rows are read as GSM8K's (prompt, completion, answer)\n"
    enter([{"prompt": "6*7=", "answer": "42"}])
    assert capsys.readouterr().out == ""


def test_what_is_missing_is_named() -> None:
    exact = find_rewards("exact_answer")
    enter([ROW], exact)
    enter([{"prompt": None}, {"prompt": "6*7="}])
    with pytest.raises(UsageError, match="no dataset: say dataset_name"):
        enter()
    with pytest.raises(UsageError, match="reward 'exact_answer' needs the column 'answer', and the dataset has answr"):
        enter([{"prompt": "6*7=", "answr": "42"}], exact)
    with pytest.raises(UsageError, match="needs the column 'answer'"):
        enter([{"prompt": None}], exact)
    with pytest.raises(UsageError, match="demonstrations have the columns"):
        enter([{"prompt": "a"}], reader=demonstration)
    with pytest.raises(UsageError, match="reward_funcs judge held-out prompts here"):
        enter([ROW], exact, demonstration)
    with pytest.raises(UsageError, match="a list of rows; not int"):
        enter(3)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2.5, 7), (0.1, 1)])
def test_passes_over_the_rows_become_steps(epochs: float, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = as_rows([{"prompt": "6*7="}] * 10)
    config = preflight.with_steps(TrainConfig(num_train_epochs=epochs, prompts_per_step=4), rows)
    assert (config.max_steps, config.num_train_epochs) == (steps, None)
    assert f"num_train_epochs {epochs:g} is max_steps {steps} here, of 10 rows" in capsys.readouterr().out
    assert preflight.with_steps(TrainConfig(), rows).max_steps == 100
    with pytest.raises(UsageError, match="a stream has no number of rows; say max_steps"):
        preflight.with_steps(TrainConfig(num_train_epochs=epochs), cast(datasets.Dataset, rows).to_iterable_dataset())


def test_a_rewards_own_time_limit_must_end_before_its_workers() -> None:
    def graded(completions: list[str], *, seconds: float | None = None) -> list[float]:
        return [seconds or 0.0 for _ in completions]

    assert preflight.rewards_of(TrainConfig(), graded, None)[0].options == {"seconds": None}, "what it may mean is its"
    assert preflight.rewards_of(TrainConfig(), "code", None)[0].options["seconds"] == 5
    with pytest.raises(UsageError, match=r"reward_timeout=10.0 cannot work: reward 'code' itself takes up to 12 s"):
        preflight.rewards_of(TrainConfig(reward_options={"code": {"seconds": 12}}), "code", None)


def test_a_critic_that_the_algorithm_has_no_use_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from nanorlhf.grpo import GRPO\nfrom nanorlhf.ppo import PPO\n")
    assert preflight.find_algorithm(PPOConfig(algorithm=f"{tmp_path}/own.py:PPO"), PPO).name == "ppo"
    with pytest.raises(UsageError, match="grpo asks for no values, so a critic is of no use"):
        preflight.find_algorithm(PPOConfig(algorithm=f"{tmp_path}/own.py:GRPO"), PPO)


def test_what_episodes_alone_give_is_asked_for_with_an_environment() -> None:
    def bonus(environment_returns: list[float]) -> list[float]:
        return environment_returns

    def optional(completions: list[str], environment_returns: Any = None) -> list[float]:
        return environment_returns or [0.0 for _ in completions]

    with pytest.raises(UsageError, match="reward 'bonus' needs environment_returns: say environment or tools"):
        preflight.rewards_of(TrainConfig(), [bonus], None)
    assert [r.name for r in preflight.rewards_of(TrainConfig(), [bonus], Guessing)] == ["environment", "bonus"]
    assert preflight.rewards_of(TrainConfig(), [optional], None)


def test_sizes_are_bounded_by_this_machines_memory() -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    options: dict[str, Any] = {"prompts_per_step": 2, "max_completion_length": 1000, "reward_workers": 0}
    most = memory // (2 * (preflight.COMPLETION + 1000 * preflight.TOKEN))
    preflight.check_sizes(GRPOConfig(**options, num_generations=most), GRPO)
    with pytest.raises(UsageError, match=r"num_generations .* token ids need .* GiB at least, and this machine has"):
        preflight.check_sizes(GRPOConfig(**options, num_generations=most + 1), GRPO)
    with pytest.raises(UsageError, match=r"num_generations=.*cannot work"):
        preflight.check_sizes(ReMaxConfig(**options, num_generations=most), ReMax)  # and a greedy one beside them


def test_ranks_are_bounded_too() -> None:
    options: dict[str, Any] = {"model_name_or_path": "nanorlhf:adder", "device": "cpu", "lora": "q_proj"}
    options |= {"max_prompt_length": 9, "max_completion_length": 9}
    layers, wide = 3, 128
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = memory // (preflight.ADAM * layers * 2 * wide)
    about = loading.check_model(TrainConfig(**options), None)
    preflight.check_rank(TrainConfig(**options, lora_r=most, lora_alpha=1), about)
    for rank in (most + 1, 2**53 - 1):
        with pytest.raises(UsageError, match=r"lora_r=.* weights, their gradients and moments need"):
            preflight.check_rank(TrainConfig(**options, lora_r=rank), about)


def test_the_bounds_are_below_what_is_really_taken() -> None:
    prompt = Prompt(0, [1], "1+1=", {})
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    samples = [Sample(prompt, [1000 + i for i in range(100)], [], False, "") for _ in range(100)]
    taken = (tracemalloc.get_traced_memory()[0] - before) / len(samples)
    tracemalloc.stop()
    assert 100 * preflight.TOKEN + preflight.COMPLETION <= taken < 10 * (100 * preflight.TOKEN + preflight.COMPLETION)


def test_an_environments_failures_are_shown_in_its_own_file() -> None:
    class World:
        def reset(self, **columns: Any) -> None: ...
        def step(self, completion: str) -> tuple[str, float, bool]:
            raise KeyError(completion)

    (reward,) = preflight.rewards_of(TrainConfig(), [], World)
    assert reward.file == __file__
