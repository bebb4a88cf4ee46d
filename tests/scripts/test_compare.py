"""Comparisons: what is asked of them, what is refused, and that they go on where they were cut off."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nanorlhf.cli import parse
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig
from nanorlhf.records.directory import read_lines
from nanorlhf.scripts import compare
from nanorlhf.scripts.compare import Job, build_parser, plan, read_entry, safe

SMALL = ["--steps", "3", "--seeds", "2", "--engine", "hf", "--eval_prompts", "16", "--prompts_per_step", "8"]


def planned(*words: str) -> list[Job]:
    """The runs that a command line asks for."""
    first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    args, rest = build_parser().parse_known_args(words[first:])
    return plan(words[:first], args, rest)


def test_every_entry_has_the_same_budget() -> None:
    jobs = planned("grpo", "raft", "grpo:num_generations=4", "--samples", "512", "--seeds", "2")
    assert [(job.entry.name, job.seed) for job in jobs[:4]] == [
        ("grpo", 0), ("raft", 0), ("grpo:num_generations=4", 0), ("grpo", 1)
    ]  # fmt: skip
    assert [job.config.max_steps for job in jobs[:3]] == [2, 2, 4], "32 prompts with 8 or 4 answers a step"
    assert [job.entry.samples * job.config.max_steps for job in jobs] == [512] * 6
    timed = planned("grpo", "rloo", "--minutes", "2")[0].config
    assert (timed.max_minutes, timed.lr_scheduler_type) == (2, "constant")
    longest = planned("grpo", "grpo:max_prompt_length=40", "--engine", "hf")
    assert {job.config.max_steps for job in longest} == {60}


def test_passes_over_the_rows_are_a_budget_that_gives_way(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_train_epochs: 2\n")
    (job,) = planned(f"grpo:{recipe}", "--steps", "5", "--seeds", "1")
    _, config = parse(GRPOConfig, "grpo", Path(__file__).parents[2] / "grpo" / "recipes", job.words[1:])
    assert (config.max_steps, config.num_train_epochs) == (5, None)
    assert config == job.config


def test_options_go_by_any_name() -> None:
    (job,) = planned("grpo", "--steps", "5", "--seeds", "1", "--eval_every", "1")
    assert (job.config.eval_steps, job.words.count("--eval_steps")) == (1, 0)
    with pytest.raises(UsageError, match="max_steps"):
        planned("grpo", "--num_steps", "5")


def test_an_entry_has_recipes_and_options_of_its_own() -> None:
    entry = read_entry("grpo:dapo,learning_rate=0.001,reward_weights=[0.5]", "tiny", ["--engine", "hf"])
    config = entry.config
    assert (config.learning_rate, config.engine) == (0.001, "hf")
    plain = read_entry("grpo", "tiny", []).config
    assert isinstance(config, GRPOConfig)
    assert isinstance(plain, GRPOConfig)
    assert list(config.reward_weights or []) == [0.5]
    assert (config.dynamic_sampling, plain.dynamic_sampling) == (3, 0), "the recipe lies over tiny"
    assert safe(entry.name) == "grpo-dapo-learning_rate=0.001-reward_weights=-0.5"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name what is to be compared"),
        (["grop"], "unknown algorithm 'grop': did you mean 'grpo'?"),
        (["grpo", "grpo"], "named twice"),
        (["grpo", "--seeds", "0"], "--seeds 0 cannot work"),
        (["grpo", "--minutes", "-1"], "--minutes -1.0 cannot work"),
        (["grpo", "--seed", "1"], "a comparison sets seed itself; say --seeds"),
        (["grpo:max_steps=3"], "a comparison sets max_steps itself; say --steps"),
        (["grpo:dapoo"], "dapoo"),
        (["grpo:learning_rat=1"], "learning_rat"),
        (["grpo", "rloo:reward_funcs=numeric"], "differ in reward_funcs"),
        (["grpo", "--lora_r", "-1"], "lora_r"),
    ],
)
def test_mistakes_are_a_line_before_anything_runs(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*words, "--output", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_it_goes_on_where_it_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["grpo", "raft", *SMALL, "--output", str(tmp_path)]
    child = subprocess.Popen([sys.executable, "-m", "nanorlhf.scripts.compare", *words], start_new_session=True)
    second = tmp_path / "runs" / "raft-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (second.exists() and read_lines(second)):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    for folder in (tmp_path / "runs").iterdir():  # runs are in groups of their own
        subprocess.run(["pkill", "-9", "-f", str(folder)], check=False)
    child.wait()
    first = (tmp_path / "runs" / "grpo-seed0" / "metrics.jsonl").read_bytes()
    assert compare.main(words) == 0
    said = capsys.readouterr().out
    assert "4 runs in" in said
    assert "1 of them finished" in said
    assert (tmp_path / "runs" / "grpo-seed0" / "metrics.jsonl").read_bytes() == first, "not run again"
    for folder in (tmp_path / "runs").iterdir():
        assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [(run["entry"], run["seed"]) for run in found["runs"]] == [
        ("grpo", 0),
        ("grpo", 1),
        ("raft", 0),
        ("raft", 1),
    ]
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [row["completions"] for row in rows] == ["192"] * 4
    last = read_lines(tmp_path / "runs" / "raft-seed1" / "metrics.jsonl")[-1]
    assert found["runs"][3]["curve"]["reward"][-1] == pytest.approx(last["eval/reward"], rel=1e-4)
    for name in ("reward_by_time.png", "reward_by_samples.png", "phases.png", "comparison.md", "comparison.html"):
        assert (tmp_path / name).stat().st_size > 300
    answer = said[said.index("Held-out reward, mean") :]
    assert all(
        words in answer for words in ("over the last fifth", "training seconds", "Two seeds say little", "raft  2")
    )
    assert answer.endswith(f": {tmp_path / 'comparison.html'}\n")
    assert compare.main(words) == 0
    assert capsys.readouterr().out.endswith(answer), "a second call answers too"
    assert compare.main(["grpo", "raft", *SMALL, "--lora_r", "4", "--output", str(tmp_path)]) == 2
    assert "was made with lora_r=" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_said_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = tmp_path / "broken.py"
    reward.write_text("def broken(completions, **columns):\n    raise ValueError('not today')\n")
    words = ["grpo", *SMALL[:2], "--seeds", "1", *SMALL[4:], "--reward_funcs", f"{reward}:broken"]
    assert compare.main([*words, "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "grpo-seed0: failed (1):" in said
    assert "not today" in said
    assert said.endswith("no run is finished, so there is nothing to compare\n")
    assert yaml.safe_load((tmp_path / "out" / "runs" / "grpo-seed0" / "config.yaml").read_text())["max_steps"] == 3
