"""Ctrl-C and SIGTERM at any moment of a run's start end it, whatever a library makes of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from nanorlhf.grpo import GRPOTrainer
from nanorlhf.records.directory import read_lines
from nanorlhf.system.signals import heed, listening
from tests.test_trainer import config

ROOT = Path(__file__).parents[2]
ENDS = """
import os, signal
from contextlib import suppress
from nanorlhf.system.signals import listening
with listening(ends=True):
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.{first})
    try:
        os.kill(os.getpid(), signal.{second})
    finally:
        print("still here")
"""
SWALLOWS = """
import os, signal

class Handle:
    def __del__(self):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            open("closed", "w").close()

def rows(split):
    Handle()
    return [{"prompt": "1+1=", "answer": "2"}]
"""
SLOW = """
def rows(split):
    return [{"question": "How many? " * 2000, "answer": "#### 2"}] * 4096
"""


class Handle:
    """Interrupted as it is deleted, as files and sessions of libraries are, when Python drops every exception."""

    interrupted: ClassVar[int] = 0

    def __del__(self) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            Handle.interrupted += 1
            raise


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python reports what it drops, and an interruption is nothing to report."""
    found: list[type[BaseException] | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: found.append(dropped.exc_type))
    monkeypatch.setattr(Handle, "interrupted", 0)
    yield
    assert Handle.interrupted == 1
    assert found == []


@pytest.mark.usefixtures("unreported")
def test_what_was_dropped_is_raised_at_the_next_stage_or_at_the_end() -> None:
    def outer() -> None:
        with listening():
            Handle()
            with pytest.raises(KeyboardInterrupt):
                heed()
            with pytest.raises(KeyboardInterrupt):
                inner()

    @listening()
    def inner() -> None:
        """A part of what is listened to."""

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        outer()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    heed()


def test_an_interruption_that_a_library_calls_something_else_stays_one() -> None:
    @listening()
    def loads(interrupted: bool) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM if interrupted else 0)
        except BaseException as error:
            raise ValueError("cannot be loaded") from error
        raise ValueError("cannot be loaded")

    with pytest.raises(KeyboardInterrupt):
        loads(True)
    with pytest.raises(ValueError, match="cannot be loaded"):
        loads(False)


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_the_second_signal_ends_the_process_at_once(first: str, second: str) -> None:
    code = ENDS.format(first=first, second=second)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.usefixtures("unreported")
def test_a_trainer_made_in_python_is_not_made_then(tmp_path: Path) -> None:
    def rewarded(completions: list[str]) -> list[float]:
        return [1.0 for _ in completions]

    class Rows(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            Handle()
            return super().__iter__()

    rows = Rows([{"prompt": "1+1="}])
    with pytest.raises(KeyboardInterrupt):
        GRPOTrainer(reward_funcs=rewarded, args=config(tmp_path / "run"), train_dataset=rows)
    assert not (tmp_path / "run").exists()


class Start:
    """A run that starts in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.run, self.log = folder, folder / "run", folder / "log"
        line = [sys.executable, "-m", "nanorlhf.grpo", "--recipe", "tiny", "--engine", "hf", "--output_dir", "run"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*line, "--max_steps", "1", "--eval_prompts", "8", *words], stdout=log, stderr=log, cwd=folder
            )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not happened():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def said(self) -> str:
        return self.log.read_text()

    def hears(self) -> bool:
        """Whether the process has a handler for SIGTERM, which Python itself has not."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return bool(int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16) >> (signal.SIGTERM - 1) & 1)

    def expect_interrupted(self) -> None:
        assert self.process.wait(60) == 130, self.said()
        lines = [line for line in self.said().splitlines() if not line.startswith(("nanorlhf grpo: nano", "training"))]
        assert lines == ["nanorlhf grpo: interrupted"]
        assert read_lines(self.run / "metrics.jsonl") == []

    def is_on_its_way(self) -> bool:
        return "nanorlhf grpo: nano" in self.said()


Begin = Callable[..., Start]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Begin]:
    """Starts runs, and ends those that still go on."""
    started: list[Start] = []

    def begin(*words: str) -> Start:
        started.append(Start(tmp_path, *words))
        return started[-1]

    yield begin
    for one in started:
        with suppress(ProcessLookupError):
            one.process.kill()
        one.process.wait()


MOMENTS: dict[str, Callable[[Start], bool]] = {
    "before anything is imported": Start.hears,
    "at its first line": Start.is_on_its_way,
    "when its folder is made": lambda start: (start.run / "run.json").exists(),
    "as the model is loaded": lambda start: (start.run / "checkpoints").exists(),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says which signals a process hears")
@pytest.mark.parametrize(("moment", "number"), zip(MOMENTS, [signal.SIGINT, signal.SIGTERM] * 2, strict=True))
def test_a_signal_ends_the_start(moment: str, number: int, start: Begin) -> None:
    begun = start()
    begun.wait_for(lambda: MOMENTS[moment](begun))
    begun.process.send_signal(number)
    begun.expect_interrupted()
    assert begun.is_on_its_way() == (moment != "before anything is imported")


@pytest.mark.slow
def test_a_signal_is_heard_while_prompts_are_prepared(tmp_path: Path, start: Begin) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    more = ["--dataset_name", "slow.py:rows", "--dataset_test_split", "null", "--max_prompt_length", "100"]
    begun = start(*more)
    begun.wait_for(lambda: "training rows are read" in begun.said())
    begun.process.send_signal(signal.SIGTERM)
    begun.expect_interrupted()
    assert not begun.run.exists()


@pytest.mark.slow
def test_an_evaluation_ends_in_a_line() -> None:
    words = ["evaluate", "nanorlhf:adder", "--recipe", "grpo/recipes/tiny.yaml", "--engine", "hf", "--samples", "500"]
    line = [sys.executable, "-m", "nanorlhf", *words]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as evaluation:
        assert evaluation.stdout is not None and evaluation.stderr is not None
        assert evaluation.stdout.readline() == "evaluate: nanorlhf:adder\n"
        evaluation.send_signal(signal.SIGINT)
        assert evaluation.stderr.read() == "evaluate: interrupted; with --output the same command goes on from here\n"
    assert evaluation.returncode == 130


@pytest.mark.slow
def test_a_signal_that_python_drops_is_not_lost(tmp_path: Path, start: Begin) -> None:
    (tmp_path / "mine.py").write_text(SWALLOWS)
    begun = start("--dataset_name", "mine.py:rows", "--dataset_test_split", "null")
    begun.process.wait(120)
    assert (tmp_path / "closed").exists(), "the interruption was dropped"
    begun.expect_interrupted()
    assert not begun.run.exists()
