"""Shows the user how a run goes on, and how it ended."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from nanorlhf.system.terminal import log, speaks

TRAINING = ("reward/mean", "accuracy", "loss")  # what a run is about: the first of these that it has
HELD_OUT = ("eval/reward", "eval/accuracy", "eval/loss")


class ProgressBar:
    """A bar on a terminal or in a notebook; a line a step in a log file."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self.started, self.tokens = time.perf_counter(), 0
        self.live = sys.stderr.isatty() or in_notebook()
        heard = speaks() and self.live
        self.bar = tqdm(  # drawn as time goes by, whether a step was finished or not
            total=total, initial=done, unit="step", dynamic_ncols=True, miniters=0, disable=not heard
        )
        self.first = done
        log.addFilter(self.numbered)

    def writing(self, tokens: int) -> None:
        """Shows that completions arrive."""
        self.tokens += tokens
        self.bar.set_description_str(f"{self.tokens:,} tokens", refresh=False)
        self.bar.update(0)

    def step(self, metrics: dict[str, Any]) -> None:
        """Shows a finished step."""
        self.done += 1
        self.tokens = 0
        name, held_out = headline([metrics], TRAINING), headline([metrics], HELD_OUT)
        shown = {name: number(metrics[name]), "tok/s": f"{metrics['throughput/tokens_per_s']:,.0f}"}
        shown |= {held_out: number(metrics[held_out])} if held_out in metrics else {}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
        if not self.live:
            left = (self.total - self.done) * (time.perf_counter() - self.started) / (self.done - self.first)
            words = " ".join(f"{name} {value}" for name, value in shown.items())
            log.info(f"step {self.done}/{self.total} {words} left {left // 60:.0f}:{left % 60:02.0f}")

    def numbered(self, record: logging.LogRecord) -> bool:
        """Puts the step that is being taken before a warning."""
        if record.levelno >= logging.WARNING:
            record.msg = f"step {self.done + 1}: {record.msg}"
        return True

    def close(self) -> None:
        """Ends the bar."""
        log.removeFilter(self.numbered)
        self.bar.close()


def in_notebook() -> bool:
    """Whether a cell of a notebook runs this; to have its kernel's library imported is not enough."""
    shell = sys.modules.get("IPython")
    return shell is not None and shell.get_ipython() is not None


def number(value: float | None) -> str:
    """Three digits, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.3g}"


def headline(history: list[dict[str, Any]], names: Sequence[str]) -> str:
    """The first of `names` that was measured, or else the last."""
    return next((name for name in names if any(row.get(name) is not None for row in history)), names[-1])


def curve(history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it was measured."""
    points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
    return [x for x, _ in points], [y for _, y in points]


def summary(history: list[dict[str, Any]], run: Path) -> str:
    """A few lines on what the run did, with a small plot."""
    import plotext

    steps = [row for row in history if "time/step" in row]
    training, held_out = headline(history, TRAINING), headline(history, HELD_OUT)
    evaluations = curve(history, held_out)[1]
    seconds = sum(row["time/step"] for row in steps)
    lines = []
    if len(steps) > 1:
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plot_size(min(76, plotext.terminal_width() or 76), 12)
        plotext.plot(*curve(history, training), label=training)
        if len(evaluations) > 1:
            plotext.plot(*curve(history, held_out), label=held_out)
        lines.append(plotext.build() if sys.stdout.isatty() else plotext.uncolorize(plotext.build()))
    if len(evaluations) > 1:
        lines.append(f"held-out {held_out.removeprefix('eval/')} {number(evaluations[0])} -> {number(evaluations[-1])}")
    if steps:
        tokens = sum(row["tokens/rollout"] or row["tokens/trained"] for row in steps)
        peak = max(row["memory/peak_gib"] for row in steps)
        lines.append(f"{len(steps)} steps in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s, peak {peak:.1f} GiB")
    lines.append(f"everything is in {run} (adapter: {run}/checkpoints, curve: {run}/learning_curve.png)")
    return "\n".join(lines)
