"""Bad surroundings: a full disk, a folder that nobody may write, a tracker or an engine that fails, a dataset gone."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import wandb
import yaml

from nanorlhf.config import names
from nanorlhf.engines.hf import HFEngine
from nanorlhf.errors import RunError
from nanorlhf.grpo import GRPOTrainer
from nanorlhf.grpo.__main__ import main
from nanorlhf.records import checkpoint, rollout_files, tracking
from nanorlhf.system import files
from nanorlhf.trainer import Trainer
from tests.test_trainer import assert_same_outcome, config, lines, small, take

WRITERS: dict[str, tuple[Any, str]] = {  # who writes to the disk, in the order of a step
    "metrics": (tracking.RunLog, "log"),
    "samples": (tracking.RunLog, "log_samples"),
    "rollouts": (rollout_files, "keep"),
    "checkpoint": (checkpoint, "save"),
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nobody, not even root, may write."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    attribute = os.getuid() == 0
    if attribute and subprocess.run(["chattr", "+i", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("root may write everywhere, and this file system has no attribute against that")
    yield folder
    if attribute:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


def fits(file: BinaryIO, size: int) -> bool:
    """Whether there was room for so many bytes more."""
    try:
        return file.write(b"x" * size) > 0
    except OSError:
        return False


def fill(folder: Path) -> None:
    """Takes all the room there is, to the last byte."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            while fits(cast(BinaryIO, file), size):
                pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which nothing happens."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    GRPOTrainer(args=config(run, save_steps=1)).train()
    return run


def recipe(folder: Path, **options: Any) -> list[str]:
    """The command line of a small run."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(small(folder / "run") | {"save_steps": 1} | options))
    return ["--recipe", str(path)]


@pytest.mark.parametrize(("writer", "relieved"), [*((writer, False) for writer in WRITERS), ("samples", True)])
def test_a_full_disk_ends_the_run_in_one_line_and_nothing_done_is_lost(
    writer: str,
    relieved: bool,
    small_disk: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name = WRITERS[writer]
    plain: Callable[..., Any] = getattr(owner, name)
    calls: list[int] = []

    def writes(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            fill(small_disk)
        try:
            return plain(*given, **named)
        finally:
            if relieved:  # before the run has ended: what was not written must not be taken for done
                (small_disk / "filler").unlink(missing_ok=True)

    monkeypatch.setattr(owner, name, writes)
    argv, run = recipe(small_disk), small_disk / "run"
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error == (
        f"nanorlhf grpo: error: no space left on the disk of {run}; make room, and go on with --resume {run}\n"
    )
    kept = names.latest(run)
    assert kept is not None and checkpoint.damaged(kept) is None
    assert not list((run / "checkpoints").glob(".*step*")), "half a checkpoint would keep the disk full"
    (small_disk / "filler").unlink(missing_ok=True)
    assert main(["--resume", str(run)]) == 0
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert_same_outcome(undisturbed, run)
    assert len(list((run / "rollouts").glob("step_*.parquet"))) == 4


def test_other_errors_are_no_full_disk(tmp_path: Path) -> None:
    for error in (OSError(2, "No such file"), ValueError("(os error 2)"), RuntimeError("28")):
        assert not files.is_full(error)
        with pytest.raises(type(error)), files.room(tmp_path):
            raise error
    with pytest.raises(RunError, match=r"no space left .*--resume"), files.room(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(
    locked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanorlhf.trainer.Policy", lambda *_: pytest.fail("a model was loaded"))
    for folder in (locked, locked / "run"):
        assert main(["--recipe", "tiny", "--output_dir", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"nanorlhf grpo: error: output_dir='{folder}' cannot be written: ")
        assert error.count("\n") == 1


def test_a_full_disk_is_refused_before_the_model_loads(
    small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanorlhf.trainer.Policy", lambda *_: pytest.fail("a model was loaded"))
    fill(small_disk)
    assert main(["--recipe", "tiny", "--output_dir", str(small_disk / "run")]) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err


def test_an_evaluation_that_breaks_off_leaves_a_step_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    trainer = GRPOTrainer(args=config(run, save_steps=0))
    plain = trainer.evaluate

    def breaks() -> dict[str, Any]:
        if trainer.done == 2:
            raise KeyboardInterrupt
        return plain()

    monkeypatch.setattr(trainer, "evaluate", breaks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoint.step_of(names.latest(run)) == 2
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [0, 1, 2]
    assert {row["step"] for row in lines(run / "samples.jsonl")} == {1, 2}


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    trainer = GRPOTrainer(args=config(run, save_steps=1, report_to="tensorboard"))
    start = tracking.start_trackers

    def loses_its_connection(*given: Any) -> list[Any]:
        (board,) = start(*given)
        log, calls = board.log, []

        def lost(*values: Any, **named: Any) -> None:
            calls.append(1)
            if len(calls) > 2:
                raise ConnectionError("the server\nhas gone")
            log(*values, **named)

        monkeypatch.setattr(board, "log", lost)
        return [board]

    monkeypatch.setattr(tracking, "start_trackers", loses_its_connection)
    trainer.train()
    said = capsys.readouterr().out
    assert said.count("tensorboard failed, and is told no more (ConnectionError: the server has gone)") == 1
    assert_same_outcome(undisturbed, run)


def test_a_tracker_that_cannot_start_is_said(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trainer = GRPOTrainer(args=config(run, save_steps=1, report_to="tensorboard"))
    (run / "tensorboard").write_text("a file where a folder should be")
    trainer.train()
    assert capsys.readouterr().out.count("tensorboard cannot start, and is told nothing (") == 1
    assert_same_outcome(undisturbed, run)


@pytest.mark.slow
def test_wandb_without_a_connection_stays_on_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert tracking.wandb_mode() == {"mode": "offline"}
    assert "wandb cannot be reached, so its run stays on disk for `wandb sync` (" in capsys.readouterr().out
    wandb.teardown()  # which would wait for that address in the next run
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.wandb_mode() == {}


def test_a_dataset_that_has_gone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(8)))
    run = tmp_path / "run"
    take(GRPOTrainer(args=config(run, dataset_name=str(rows), dataset_test_split=None)), 1)
    rows.unlink()
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 2
    assert capsys.readouterr().err == (f"nanorlhf grpo: error: dataset_name='{rows}': there is no such file\n")


def test_a_reward_that_was_mended_needs_no_other_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def near(completions):\n    return [len(text) / 0 for text in completions]\n")
    argv = [*recipe(tmp_path, max_steps=1), "--reward_funcs", f"{reward}:near"]
    assert main(argv) == 1
    assert f"raised ZeroDivisionError: division by zero ({reward}:2)" in capsys.readouterr().err
    reward.write_text("def near(completions):\n    return [len(text) / 9 for text in completions]\n")
    assert main(argv) == 0
    assert main(argv) == 2
    assert "is not empty" in capsys.readouterr().err


class Failing:
    """An engine that raises in the middle of its work, at chosen forward passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *passes: int) -> None:
        self.passed = 0
        plain = HFEngine.forward

        def forward(engine: HFEngine, *given: Any) -> Any:
            self.passed += 1
            if self.passed in passes:
                raise RuntimeError("device-side assert triggered\nand more")
            return plain(engine, *given)

        monkeypatch.setattr(HFEngine, "forward", forward)


@pytest.mark.parametrize("passed", [1, 12, 40])
def test_an_engine_that_fails_is_started_anew_and_writes_the_same(
    passed: int,
    tmp_path: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing = Failing(monkeypatch, passed)
    GRPOTrainer(args=config(tmp_path / "run", save_steps=1)).train()
    assert failing.passed > passed
    said = capsys.readouterr().out
    words = "the engine failed (RuntimeError: device-side assert triggered and more); it was started anew"
    assert said.count(words) == 1
    assert_same_outcome(undisturbed, tmp_path / "run")


def test_an_engine_that_fails_in_two_steps_is_started_anew_twice(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = GRPOTrainer(args=config(tmp_path / "run", save_steps=1))
    plain, failed = HFEngine.forward, set[int]()

    def forward(engine: HFEngine, *given: Any) -> Any:
        if trainer.done in (0, 2) and trainer.done not in failed:
            failed.add(trainer.done)
            raise RuntimeError("no more")
        return plain(engine, *given)

    monkeypatch.setattr(HFEngine, "forward", forward)
    trainer.train()
    assert capsys.readouterr().out.count("it was started anew") == 2
    assert_same_outcome(undisturbed, tmp_path / "run")


def test_a_second_failure_in_a_step_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = recipe(tmp_path, dataset_test_split=None)
    plain, trainers = Trainer.one_step, []

    def one_step(trainer: Trainer, *given: Any) -> Any:
        trainers.append(trainer)
        if trainer.done == 2:
            Failing(monkeypatch, 2, 5)
        return plain(trainer, *given)

    monkeypatch.setattr(Trainer, "one_step", one_step)
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error == (
        "nanorlhf grpo: error: the engine failed again after it was started anew (RuntimeError: device-side assert "
        f"triggered and more); go on from the last checkpoint with --resume {tmp_path / 'run'}\n"
    )
    assert checkpoint.step_of(names.latest(tmp_path / "run")) == 2


def test_an_update_that_fails_is_given_to_a_new_engine(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = GRPOTrainer(args=config(tmp_path / "run", save_steps=1))
    first = trainer.engine.engine

    def fails(_: Any) -> None:
        raise RuntimeError("cannot take them")

    monkeypatch.setattr(first, "update", fails)
    trainer.train()
    assert trainer.engine.engine is not first
    assert_same_outcome(undisturbed, tmp_path / "run")


def test_an_interruption_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = GRPOTrainer(args=config(tmp_path / "run"))
    first = trainer.engine.engine

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(HFEngine, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.engine.engine is first
