"""The cost of our update by its tokens and its groups, and what it saves if groups teach nothing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evidence.speed import ours
from evidence.speed.workloads import Run, Workload, aligned, prepare

SHORT = {  # many short samples; the first pass is on a model that is warm
    "full": Workload(prompts=8, median_length=64, sigma=0.5, longest=256),
    "tiny": Workload(
        hidden=16,
        intermediate=32,
        layers=1,
        heads=2,
        vocabulary=64,
        prompts=4,
        generations=4,
        median_length=8,
        longest=32,
    ),
}
TIMES = (1, 2, 4)
SHARES = (0.0, 0.25, 0.5, 0.75)  # of groups in which everyone earns the same
GROUPS = (2, 4, 8, 16)
GROUPED: dict[str, dict[str, Any]] = {
    "full": {"prompt_lengths": (400, 400), "median_length": 40, "sigma": 0.0},
    "tiny": {"prompt_lengths": (40, 40), "median_length": 4, "sigma": 0.0},
}
LINEAR, PROPORTIONAL = 0.2, 0.1  # how far off they may be

Measured = Callable[[Path, Workload, int], Run]


def measure_ours(folder: str, work: str, threads: str) -> None:
    """Makes one update after a small one in a process of its own, and writes its figures into `folder`."""
    import torch

    torch.set_num_threads(int(threads))
    path, given = Path(folder), Workload(**json.loads(work))
    (path / "run.json").write_text(json.dumps(ours.update(path, given, given.rollout(), warm=1)))


def repeated(options: argparse.Namespace, works: Sequence[Workload], process: Measured) -> Iterator[list[list[Run]]]:
    """Every workload's runs so far, one more each time; they alternate, so that a busy machine slows all."""
    runs: list[list[Run]] = [[] for _ in works]
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), works[0])
        for _ in range(options.repeats):
            for mine, work in zip(runs, works, strict=True):
                mine.append(process(Path(name), work, options.threads))
                yield runs


def row_tokens(work: Workload, first: int = 0) -> int:
    """Tokens that pass through the model, without the first groups: a prompt once for all its completions."""
    samples = work.rollout()[first * work.generations :]
    prompts = samples[:: work.generations]
    return sum(len(s["completion_ids"]) for s in samples) + sum(len(s["prompt_ids"]) for s in prompts)


def linearity(options: argparse.Namespace, process: Measured) -> Iterator[dict[str, Any]]:
    """One, two and four times as many samples: what a token costs, against what it costs in the smallest."""
    base = SHORT[options.size]
    works = [dataclasses.replace(base, prompts=base.prompts * k) for k in TIMES]
    tokens = [row_tokens(work) for work in works]
    for runs in repeated(options, works, process):
        rows = []
        for k, size, mine in zip(TIMES, tokens, runs, strict=True):
            if mine:
                seconds = {name: median(run[name] for run in mine) for name in ("seconds", "cpu_seconds")}
                rows.append({"times": k, "row_tokens": size, "runs": len(mine), **seconds})
        for row in rows:
            row["of_linear"] = row["cpu_seconds"] / rows[0]["cpu_seconds"] * tokens[0] / row["row_tokens"]
        holds = all(abs(row["of_linear"] - 1) <= LINEAR for row in rows)
        yield {"workload": dataclasses.asdict(base), "holds": holds, "rows": rows, "runs": runs}


def dropping(options: argparse.Namespace, process: Measured) -> Iterator[dict[str, Any]]:
    """Groups without spread in growing share: the time they save, against the share of tokens they hold."""
    base = dataclasses.replace(SHORT[options.size], kl=0.0)
    works = [dataclasses.replace(base, flat=round(share * base.prompts)) for share in SHARES]
    every = row_tokens(base)
    left_out = [1 - row_tokens(work, work.flat) / every for work in works]
    for runs in repeated(options, works, process):
        rows = []
        for work, share, mine in zip(works, left_out, runs, strict=True):
            if mine:
                seconds = {name: median(run[name] for run in mine) for name in ("seconds", "cpu_seconds")}
                rows.append({"flat_groups": work.flat / work.prompts, "tokens_left_out": share, **seconds})
        for row in rows:
            row["time_saved"] = 1 - row["cpu_seconds"] / rows[0]["cpu_seconds"]
        holds = all(abs(row["time_saved"] - row["tokens_left_out"]) <= PROPORTIONAL for row in rows)
        yield {"workload": dataclasses.asdict(base), "holds": holds, "rows": rows, "runs": runs}


def sharing(options: argparse.Namespace, process: Measured) -> Iterator[dict[str, Any]]:
    """Ever larger groups: tokens that pass through the model, against prompt + completions and against all written."""
    base = dataclasses.replace(SHORT[options.size], kl=0.0, prompts=2, **GROUPED[options.size])
    works = [dataclasses.replace(base, generations=size) for size in GROUPS]
    for runs in repeated(options, works, process):
        rows = []
        for work, mine in zip(works, runs, strict=True):
            if mine:
                written = sum(len(s["prompt_ids"]) + len(s["completion_ids"]) for s in work.rollout())
                seconds = {name: median(run[name] for run in mine) for name in ("seconds", "cpu_seconds")}
                counts = {"expected": row_tokens(work), "computed": mine[0]["row_tokens"], "written": written}
                rows.append({"group": work.generations} | counts | seconds)
        holds = all(row["computed"] == row["expected"] for row in rows)
        yield {"workload": dataclasses.asdict(base), "holds": holds, "rows": rows, "runs": runs}


def draw_sharing(report: dict[str, Any], path: Path) -> None:
    """Tokens by group size: those that pass through the model, and those that would with a prompt for each answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    sizes = [row["group"] for row in report["rows"]]
    for name, label, style in (("written", "a prompt for each answer", "--"), ("computed", "a prompt once", "-")):
        tokens = [row[name] for row in report["rows"]]
        axes.plot(sizes, tokens, style, marker="o", label=label)
        axes.annotate(
            f"{tokens[-1]:,}", (sizes[-1], tokens[-1]), xytext=(-4, 6), textcoords="offset points", ha="right"
        )
    prompt, answer = report["workload"]["prompt_lengths"][1], report["workload"]["median_length"]
    prompts = report["workload"]["prompts"]
    axes.set(xlabel="answers to each prompt", ylabel="tokens of an update", ylim=(0, None))
    axes.set_title(f"{prompts} prompts of {prompt} tokens, answers of {answer}", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def as_table(report: dict[str, Any]) -> str:
    """The rows, and whether what was expected holds."""
    heads = list(report["rows"][0])
    lines = [heads] + [
        [f"{row[h]:,.3g}" if isinstance(row[h], float) else f"{row[h]:,}" for h in heads] for row in report["rows"]
    ]
    text = "\n".join(aligned(lines, names=False))
    return f"{text}\nas expected: {'yes' if report['holds'] else 'NO'}"
