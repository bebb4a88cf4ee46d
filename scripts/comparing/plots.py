"""Comparisons as pictures: reward on its way, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanorlhf.records.metrics import PHASES
from nanorlhf.records.plots import canvas
from nanorlhf.scripts.comparing.verdicts import ALL_PHASES, REWARDS, Run, entries

# Okabe and Ito's colours, which the colour-blind can tell apart; the dashes tell the same to a printer.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 3)))
PHASE_COLOURS = dict(
    zip(ALL_PHASES, ("#E69F00", "#0072B2", "#56B4E9", "#CC79A7", "#D55E00", "#009E73", "#999999"), strict=True)
)
AXES = {"seconds": "training seconds", "samples": "completions scored"}


def draw_curves(runs: Sequence[Run], axis: str, path: Path) -> None:
    """The mean reward of each entry over `axis`, as far as all its seeds came; behind it their range."""
    figure, axes = canvas(8, 4.8)
    ends: list[tuple[float, str, str]] = []
    for number, name in enumerate(entries(runs)):
        some = [run for run in runs if run.entry == name]
        grid = np.linspace(0, min(run.curve[axis][-1] for run in some), 200)
        heights = np.array([np.interp(grid, run.curve[axis], run.curve["reward"]) for run in some])
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        if len(some) > 1:
            axes.fill_between(grid, heights.min(0), heights.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(grid, heights.mean(0), color=colour, linestyle=dash, linewidth=2, label=name)
        ends.append((float(grid[-1]), name, colour))
    seeds = max(sum(run.entry == name for run in runs) for name in entries(runs))
    shade = f"; shaded: range of {seeds} seeds" if seeds > 1 else ""
    kind = REWARDS[runs[0].reward]
    axes.set(xlabel=AXES[axis], ylabel=kind, title=f"{kind}: lines are means{shade}")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="lower right", handlelength=4)
    figure.savefig(path, dpi=150)


def draw_phases(runs: Sequence[Run], path: Path) -> None:
    """Seconds of a run by phase, a bar for each entry; the whisker is the range of whole runs."""
    names = entries(runs)
    figure, axes = canvas(8, 1.6 + 0.5 * len(names))
    left = np.zeros(len(names))
    for phase in ALL_PHASES:
        wide = np.array([np.mean([run.phases[phase] for run in runs if run.entry == name]) for name in names])
        if wide.sum() > 0.005 * sum(run.seconds for run in runs) / len(runs):
            axes.barh(names, wide, left=left, color=PHASE_COLOURS[phase], edgecolor="white", label=phase, height=0.6)
        left += wide
    totals = [[run.seconds for run in runs if run.entry == name] for name in names]
    for row, seconds in enumerate(totals):
        if len(seconds) > 1:
            axes.plot([min(seconds), max(seconds)], [row, row], color="black", linewidth=1.2, marker="|", markersize=7)
        axes.annotate(
            f"{np.mean(seconds):,.0f} s", (max(seconds), row), xytext=(7, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="training seconds of a run (mean; the line is the range over seeds)", title="where the time goes")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES) + 2, frameon=False)
    figure.savefig(path, dpi=150)
