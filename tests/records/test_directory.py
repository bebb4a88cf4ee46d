"""A run's directory, whatever moment its last owner was killed at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPOConfig
from nanorlhf.records import directory
from nanorlhf.system import files

DIES = """
import os, signal, sys
from nanorlhf.grpo import GRPOConfig
from nanorlhf.records import directory
from nanorlhf.system import files
left, whole = int(sys.argv[2]), files.sync
def sync(path):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path)
files.sync = sync
directory.prepare(GRPOConfig(output_dir=sys.argv[1], overwrite_output_dir=True), "grpo")
"""


def config(run: Path, **options: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(run), **options)


@pytest.mark.parametrize("moment", range(4))
def test_whoever_is_killed_as_a_run_begins_can_begin_again(moment: int, tmp_path: Path) -> None:
    """Before or after each of the two files is on the disk: the same command works, or --resume does."""
    run = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", DIES, str(run), str(moment)], check=False)
    assert killed.returncode == -signal.SIGKILL
    begun = (run / "config.yaml").exists()
    assert begun is (moment == 3)
    directory.prepare(config(run, resume=str(run)) if begun else config(run), "grpo")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "run.json"]
    assert directory.read_run(run).algorithm == "grpo"


def test_a_run_that_is_replaced_stays_known_as_one_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = directory.prepare(config(tmp_path / "run"), "grpo")
    (run / "checkpoints" / "step_000001").mkdir()
    others = {f"file-{number}" for number in range(20)}
    for name in others:
        (run / name).touch()
    removed: list[str] = []
    gone = os.unlink

    def dies(path: str | Path, **more: int) -> None:
        removed.append(Path(path).name)
        if removed[-1] == "config.yaml":
            raise KeyboardInterrupt
        gone(path, **more)

    monkeypatch.setattr(os, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        directory.prepare(config(run, overwrite_output_dir=True), "grpo")
    monkeypatch.undo()
    assert {*removed} == others | {"run.json", "config.yaml"} and removed[-1] == "config.yaml"
    directory.prepare(config(run, overwrite_output_dir=True), "grpo")
    assert directory.read_run(run).rows == []


def test_other_files_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="is not empty"):
        directory.prepare(config(tmp_path), "grpo")
    with pytest.raises(UsageError, match="no run of ours"):
        directory.prepare(config(tmp_path, overwrite_output_dir=True), "grpo")


@pytest.mark.parametrize(
    "options",
    [
        {"rollouts_from": "RUN"},
        {"adapter_name_or_path": "RUN/checkpoints"},
        {"reward_funcs": "exact_answer,model:RUN/checkpoints"},
        {"reward_funcs": ["RUN/near.py:near"]},
    ],
)
def test_what_a_run_begins_with_is_not_deleted(options: dict[str, Any], tmp_path: Path) -> None:
    run = directory.prepare(config(tmp_path / "run"), "grpo")
    (run / "near.py").touch()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    named = json.loads(json.dumps(options).replace("RUN", str(run)))
    with pytest.raises(UsageError, match=f"holds this run's {next(iter(options))} .*choose another"):
        directory.prepare(config(run, overwrite_output_dir=True, prompt_template="{prompt}" * 500, **named), "grpo")
    assert (run / "metrics.jsonl").exists()


def test_a_run_without_a_step_is_taken(tmp_path: Path) -> None:
    run = directory.prepare(config(tmp_path / "run"), "grpo")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/reward": 0.1}) + "\n")
    (run / "samples.jsonl").touch()
    directory.prepare(config(run, learning_rate=1.0), "grpo")
    assert directory.read_run(run).options["learning_rate"] == 1
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "run.json"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step_000001/x", "value_init/x", "thesis.txt"])
def test_a_run_that_has_done_something_is_not(name: str, tmp_path: Path) -> None:
    run = directory.prepare(config(tmp_path / "run"), "grpo")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(json.dumps({"step": 0}) + "\n" + json.dumps({"step": 1}) + "\n")
    with pytest.raises(UsageError, match="is not empty"):
        directory.prepare(config(run), "grpo")
    assert (run / name).exists()


def test_nor_is_one_that_another_process_has(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from nanorlhf.records import directory\n"
        "from nanorlhf.grpo import GRPOConfig\n"
        "directory.prepare(GRPOConfig(output_dir=sys.argv[1]), 'grpo')\n"
        "print('begun', flush=True)\n"
        "time.sleep(1000)\n"
    )
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "begun\n"
            for options in ({}, {"resume": str(run)}, {"overwrite_output_dir": True}):
                with pytest.raises(UsageError, match="another process trains there"):
                    directory.prepare(config(run, **options), "grpo")
        finally:
            other.kill()
    directory.prepare(config(run), "grpo")


def test_a_line_ends_where_json_says_and_half_a_line_is_none(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    rows = [{"completion": text} for text in ("a\u2028b", "c\x85d", "ü")]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode()[:-3])  # in the middle of the ü
    assert directory.read_lines(path) == rows[:2]
    assert directory.read_lines(tmp_path / "nowhere.jsonl") == []


def test_files_of_steps_to_come_are_forgotten(tmp_path: Path) -> None:
    for name in ("step_000002.parquet", "step_000003.parquet", "step_000004.draft", ".step_000003.json.draft"):
        (tmp_path / name).touch()
    directory.forget_after(tmp_path, 2)
    directory.forget_after(tmp_path / "nowhere", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002.parquet"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(files, "sync", lambda path: seen.append((path.name, [p.name for p in tmp_path.iterdir()])))
    files.write_whole(tmp_path / "a", "text")
    assert seen == [(".a.draft", [".a.draft"]), (tmp_path.name, ["a"])]
