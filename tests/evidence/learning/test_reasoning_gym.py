"""The script that measures Reasoning Gym's tasks: its statistics, its table, what it runs again and what not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evidence.learning import reasoning_gym
from nanorlhf.tasks.reasoning_gym import reasoning_gym_dataset


def test_only_what_is_wholly_right_counts() -> None:
    entry = json.dumps({"question": "?", "answer": "nus", "metadata": {"source_dataset": "spell_backward"}})
    answers = ["<answer>nus</answer>", "<answer>nut</answer>", "<answer>sun</answer>", ""]
    assert reasoning_gym.right(answers, [entry] * 4) == [1, 0, 0, 0]


@pytest.mark.parametrize("name", reasoning_gym.TASKS)
def test_there_are_questions_enough_to_hold_out(name: str) -> None:
    config = reasoning_gym.options(name, reasoning_gym.TASKS[name])["dataset_config"]
    assert len(reasoning_gym_dataset(name, config, "test")) == reasoning_gym.HELD_OUT
    assert len(reasoning_gym_dataset(name, config, "train")) >= 2000


def test_it_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []
    made: list[tuple[str, int]] = []
    interrupted = 3

    def measure(name: str, _task: reasoning_gym.Task, seed: int, _folder: str) -> dict[str, Any]:
        if len(made) == interrupted:
            raise KeyboardInterrupt
        made.append((name, seed))
        return {"start": 0.25, "end": 0.5 + seed / 4, "p": 10.0**-seed, "training_seconds": 60.0}

    monkeypatch.setattr(reasoning_gym, "begin", lambda name, task, folder: begun.append(name))
    monkeypatch.setattr(reasoning_gym, "measure", measure)
    out = tmp_path / "gym.json"
    with pytest.raises(KeyboardInterrupt):
        reasoning_gym.main(["--output", str(out), "--seeds", "2"])
    assert [(run["task"], run["seed"]) for run in json.loads(out.read_text())] == made
    interrupted = None
    assert reasoning_gym.main(["--output", str(out), "--seeds", "2"]) == 0
    assert begun == ["chain_sum", "spell_backward", "spell_backward"]
    assert "| chain_sum | 2 | 0.25 (0.25-0.25) -> 0.62 (0.50-0.75) | 1e+00 | 60 (60-60) |" in capsys.readouterr().out
