"""The bar on a terminal, and the lines of a log file."""

from __future__ import annotations

import io
import sys
import time

import pytest

from nanorlhf.console import Progress

STEP = {"reward/mean": 0.512345, "throughput/tokens_per_s": 1234.5}


class Terminal(io.StringIO):
    """A standard error that somebody looks at."""

    def isatty(self) -> bool:
        return True


def test_bar_moves_while_completions_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step, not in the first alone: a later one may take minutes."""
    seen = Terminal()
    monkeypatch.setattr(sys, "stderr", seen)
    progress = Progress(3, 0)
    try:
        for done in (1, 2):
            time.sleep(0.11)  # the bar is drawn ten times a second
            progress.writing(70)
            progress.writing(30)
            progress.step(STEP)
            time.sleep(0.11)
            progress.writing(5)
            drawn = seen.getvalue().rpartition("\r")[2]
            assert drawn.startswith("5 tokens") and f"| {done}/3 " in drawn and "reward/mean=0.512" in drawn
    finally:
        progress.close()


def test_log_has_a_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(3, 1)
    progress.step(STEP)
    progress.step(STEP | {"eval/reward": 0.25})
    progress.close()
    out, error = capsys.readouterr()
    assert [line.rpartition(" left ")[0] for line in out.splitlines()] == [
        "step 2/3 reward/mean 0.512 tok/s 1,234",
        "step 3/3 reward/mean 0.512 tok/s 1,234 eval/reward 0.25",
    ]
    assert error == ""
