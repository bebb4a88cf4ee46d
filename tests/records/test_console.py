"""The bar on a terminal, and the lines of a log file."""

from __future__ import annotations

import gc
import io
import sys
import time
from pathlib import Path

import pytest

from nanorlhf.records.console import ProgressBar, curve
from nanorlhf.records.plots import POINTS, draw_png, thinned
from nanorlhf.system.terminal import log

STEP = {"reward/mean": 0.512345, "throughput/tokens_per_s": 1234.5}


class Terminal(io.StringIO):
    """A standard error that somebody looks at."""

    def isatty(self) -> bool:
        return True


def test_bar_moves_while_completions_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step, not in the first alone: a later one may take minutes."""
    seen = Terminal()
    monkeypatch.setattr(sys, "stderr", seen)
    progress = ProgressBar(3, 0)
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
    progress = ProgressBar(3, 1)
    progress.step(STEP)
    progress.step(STEP | {"eval/reward": 0.25})
    progress.close()
    out, error = capsys.readouterr()
    assert [line.rpartition(" left ")[0] for line in out.splitlines()] == [
        "step 2/3 reward/mean 0.512 tok/s 1,234",
        "step 3/3 reward/mean 0.512 tok/s 1,234 eval/reward 0.25",
    ]
    assert error == ""


def test_a_warning_has_the_step_that_is_being_taken(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressBar(3, 1)
    log.info("a line")
    log.warning("50% of it")
    progress.step(STEP)
    log.warning("more")
    progress.close()
    log.warning("the end")
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("step 2/3")]
    assert said == ["a line", "step 2: 50% of it", "step 3: more", "the end"]


def canvases() -> int:
    """The number of pictures in memory; other tests may have left some."""
    gc.collect()
    return sum(type(thing).__name__ == "FigureCanvasAgg" for thing in gc.get_objects())


def test_a_long_run_is_drawn_with_no_more_points_and_no_more_memory(tmp_path: Path) -> None:
    rows = [{"step": step, "reward/mean": step / 10_000, "eval/reward": 0.5} for step in range(10_000)]
    draw_png(rows, tmp_path / "a.png", "run")
    pictures = canvases()
    for name in ("b", "c"):
        draw_png(rows, tmp_path / f"{name}.png", "run")
    assert canvases() <= pictures
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]
    steps, values = thinned(*curve(rows, "reward/mean"))
    assert len(steps) == len(values) == POINTS == 500
    assert values == pytest.approx([step / 10_000 for step in steps])
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3, 4]) and thinned([], []) == ([], [])
