"""The output of a comparison: tables, a CSV, a JSON that is small enough to keep, pictures and a page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from nanorlhf.records.directory import RunRecord
from nanorlhf.scripts.comparing import plots
from nanorlhf.scripts.comparing.verdicts import (
    ALL_PHASES,
    FIGURES,
    REWARDS,
    Run,
    entries,
    figures,
    grouped,
    pairs,
    rounded,
    shared,
    spread,
    to_json,
    verdicts,
)
from nanorlhf.scripts.reporting.page import Table, page
from nanorlhf.system.files import write_whole

COSTS = {
    "training seconds": ",.0f",
    "rollout tokens/s": ",.0f",
    "tokens/s": ",.0f",
    "completions/s": ",.1f",
    "reward an hour": ",.2f",
    "peak GiB": ".2f",
    "rollout time in the tail": ".2f",  # fewer than a quarter of the sequences decode
}
MEANS = "all but the start are means over the last fifth of the way there"


def publish(runs: Sequence[Run], records: Sequence[RunRecord], output: Path) -> str:
    """Writes everything into a folder, and gives what there is to say of it."""
    made = tables(runs)
    words = verdicts(runs)
    write_whole(output / "comparison.json", to_text(runs))
    write_whole(output / "comparison.csv", table_of_runs(runs))
    write_whole(output / "comparison.md", markdown(made, words))
    for axis in ("seconds", "samples"):
        name = {"seconds": "reward_by_time", "samples": "reward_by_samples"}[axis]
        plots.draw_curves(runs, axis, output / f"{name}.png")
    plots.draw_phases(runs, output / "phases.png")
    said = Table("What exceeds the noise", ["verdict"], [[line] for line in words])
    title = f"{', '.join(entries(runs))} compared"
    write_whole(output / "comparison.html", page(records, title=title, tables=[said, *made]))
    parts = [*(f"{table.caption}\n{columns(table)}" for table in made[:2]), "\n".join(words)]
    return "\n\n".join([*parts, f"curves and samples of all runs: {output / 'comparison.html'}"])


def tables(runs: Sequence[Run]) -> list[Table]:
    """Reward, cost, and where the time went: mean and standard deviation over the seeds of each entry."""
    by_run = figures(runs)
    kind = REWARDS[runs[0].reward]
    heads = ["", "seeds", "at the start", f"after {shared(runs, 'seconds'):,.0f} s"]
    heads += [f"after {shared(runs, 'samples'):,.0f} completions", FIGURES["end"]]
    starts = grouped(runs, [run.curve["reward"][0] for run in runs])
    values = {figure: grouped(runs, by_run[figure]) for figure in FIGURES}
    rewards = [
        [name, str(len(starts[name])), *(spread(v[name], ".3f") for v in (starts, *values.values()))]
        for name in entries(runs)
    ]
    spent = [costs(name, runs) for name in entries(runs)]
    return [
        Table(f"{kind[0].upper()}{kind[1:]}, mean ± standard deviation over seeds; {MEANS}", heads, rewards),
        Table("Cost of a run", ["", *measured(runs), "largest mismatch"], spent),
        phases(runs),
    ]


def measured(runs: Sequence[Run]) -> list[str]:
    """The costs that some run has."""
    return [cost for cost in COSTS if any(cost in run.costs() for run in runs)]


def costs(name: str, runs: Sequence[Run]) -> list[str]:
    """The cost of an entry; the mismatch is that between the log-probabilities of engine and trainer."""
    some = [run for run in runs if run.entry == name]
    each = [run.costs() for run in some]
    cells = [
        spread([c[cost] for c in each], COSTS[cost]) if all(cost in c for c in each) else "-" for cost in measured(runs)
    ]
    mismatches = [run.mismatch for run in some if run.mismatch is not None]
    return [name, *cells, f"{max(mismatches):.0e}" if mismatches else "-"]


def phases(runs: Sequence[Run]) -> Table:
    """Seconds that a run spent in each phase, without those that nobody had."""
    had = [phase for phase in ALL_PHASES if any(run.phases[phase] >= 0.05 for run in runs)]
    rows = [
        [name, *(spread([run.phases[phase] for run in runs if run.entry == name], ".1f") for phase in had)]
        for name in entries(runs)
    ]
    return Table("Seconds in each phase of a run", ["", *had], rows)


def markdown(made: Sequence[Table], words: Sequence[str]) -> str:
    """Tables and verdicts as text."""
    parts = [f"**{table.caption}**\n\n{table_text(table)}" for table in made]
    return "\n\n".join([*parts, "**What exceeds the noise**", "\n".join(f"- {line}" for line in words)]) + "\n"


def columns(table: Table) -> str:
    """A table for a terminal."""
    cells = [table.heads, *table.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)) for row in cells)


def table_text(table: Table) -> str:
    """A table as Markdown."""
    lines = [table.heads, ["---"] * len(table.heads), *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("|  |", "| |")


def table_of_runs(runs: Sequence[Run]) -> str:
    """A row for each run, with every figure."""
    by_run = figures(runs)
    rows = [
        {"entry": run.entry, "seed": run.seed, "start": run.curve["reward"][0]}
        | {FIGURES[figure].replace(" ", "_"): by_run[figure][at] for figure in FIGURES}
        | {name.replace(" ", "_"): value for name, value in run.costs().items()}
        | {"completions": run.samples, "tokens": run.tokens, "largest_mismatch": run.mismatch}
        | {f"seconds_{phase.replace(' ', '_')}": seconds for phase, seconds in run.phases.items()}
        for at, run in enumerate(runs)
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rounded(row) for row in rows)
    return out.getvalue()


def to_text(runs: Sequence[Run]) -> str:
    """Every run with its slim curve, a line each, and what was found."""
    by_run = figures(runs)
    means = {name: {f: fmean(grouped(runs, v)[name]) for f, v in by_run.items()} for name in entries(runs)}
    found = {
        "verdicts": verdicts(runs),
        "means": rounded(means),
        "pairs": [rounded(asdict(pair)) for pair in pairs(runs)],
    }
    lines = ",\n".join(json.dumps(to_json(run)) for run in runs)
    return f'{json.dumps(found, indent=1)[:-2]},\n "runs": [\n{lines}\n]}}\n'


def read_runs(path: Path) -> list[Run]:
    """The runs that a `comparison.json` keeps."""
    return [Run(**run) for run in json.loads(path.read_text())["runs"]]
