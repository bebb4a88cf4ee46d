"""Learning curves as pictures, in the terminal and as files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from nanorlhf.records.console import HELD_OUT, TRAINING, curve, headline

POINTS = 500  # of a curve in a picture, at most
WORDS = {"reward/mean": "training reward", "eval/reward": "held-out reward", "eval/accuracy": "held-out accuracy"}


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """An empty picture and its axes, inches wide and high."""
    figure = figure_of(width, height)
    figure.clear()
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


@cache
def figure_of(width: float, height: float) -> Any:
    """One for all pictures of a size: figures hold themselves, and megabytes would stay for thousands of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def draw_png(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """The learning curve as a picture: reward (or what comes next to it) while training, and held out."""
    figure, axes = canvas(7, 4)
    training, held_out = headline(history, TRAINING), headline(history, HELD_OUT)
    axes.plot(*thinned(*curve(history, training)), color="#9db4d6", label=WORDS.get(training, training))
    if any(held_out in row for row in history):
        points = thinned(*curve(history, held_out))
        axes.plot(*points, color="#1b4f9c", marker="o", label=WORDS.get(held_out, held_out))
    axes.set(xlabel="step", title=title)
    axes.legend(frameon=False, loc="lower right")
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, format="png", dpi=150)
    draft.replace(path)


def thinned(steps: list[int], values: list[float]) -> tuple[list[float], list[float]]:
    """Means of neighbours, so few that a picture has room for all of them."""
    size = -(-len(steps) // POINTS)
    parts = [slice(at, at + size) for at in range(0, len(steps), size or 1)]
    return [fmean(steps[part]) for part in parts], [fmean(values[part]) for part in parts]
