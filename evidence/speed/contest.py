"""One measurement a process, both sides in turn, and what is made of the figures."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from evidence.results import ROOT
from evidence.speed import ours, time_to_reward, trl_engines, workloads
from evidence.speed import trl_updates as rivals
from evidence.speed.time_to_reward import STARTED, Goal
from evidence.speed.workloads import LORA_R, OURS, Run, Setting, Workload, aligned, memory

MEASURE = "import sys; from evidence.speed.contest import measure; measure(*sys.argv[1:])"
FULL = ("can't allocate memory", "MemoryError", "bad_alloc", "Cannot allocate memory")
# How far runs may differ: float32 sums in another order differ by less, or if a loss is of a whole sequence's sum of
# log-probabilities by somewhat more; a random end token may cut a completion short.
ALIKE = {"loss": 1e-5, "grad_norm": 1e-6, "tokens": 0.03}
OF_SEQUENCES = {"rloo": {"grad_norm": 1e-5}, "dpo": {"grad_norm": 1e-5}}
NEAR_ZERO = 0.01  # losses below this are compared as if they were as large
LOADED = Setting("loaded")
HEADS = ("seconds", "cpu_seconds", "above_start_mib", "above_loaded_mib", "peak_mib")


@dataclass(frozen=True, slots=True)
class Contest:
    """The work of both sides, and their settings."""

    kind: str  # update, step, refresh or reach
    work: Workload | Goal
    rivals: Sequence[Setting]
    ours: Sequence[Setting] = (OURS,)
    limit_gib: float = 0.0  # of TRL's memory; the first rival that keeps within it is measured


def load_only(folder: Path) -> Run:
    """The memory that the libraries and the model take before anyone trains it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {"baseline_mib": memory()[0], "parameters": model.num_parameters()}


def measure(folder: str, kind: str, work: str, setting: str, limit_gib: str, threads: str) -> None:
    """Makes one measurement in a process of its own, and writes its figures into `folder`."""
    import torch

    torch.set_num_threads(int(threads))
    path, how = Path(folder), Setting(**json.loads(setting))
    given = (Goal if kind == "reach" else Workload)(**json.loads(work))
    if float(limit_gib):
        limit = int(float(limit_gib) * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    (path / "run.json").write_text(json.dumps(load_only(path) if how == LOADED else worked(path, kind, given, how)))


def worked(folder: Path, kind: str, work: Any, setting: Setting) -> Run:
    """One side's work."""
    mine = setting.side == "ours"
    if kind != "update":
        return getattr(ours if mine else trl_engines, kind)(folder, work, setting)
    samples = json.loads((folder / "rollout.json").read_text())
    return (ours if mine else rivals).update(folder, work, samples, setting)


def spawn(folder: Path, code: str, *arguments: str, threads: int) -> str | None:
    """Runs `code` in a process of its own; what it said if it ran out of memory, and the end if it failed otherwise."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(ROOT), STARTED: str(time.time())}
    command = [sys.executable, "-c", code, str(folder), *arguments, str(threads)]
    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if not ended.returncode:
        return None
    if any(words in ended.stderr for words in FULL) or ended.returncode == -9:
        return ended.stderr
    raise SystemExit(f"{arguments} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")


def in_a_process(folder: Path, contest: Contest, setting: Setting, threads: int) -> Run | None:
    """One measurement; None if there was less memory than it needs."""
    limit = contest.limit_gib if setting.side == "trl" else 0.0
    asked = (contest.kind, json.dumps(asdict(contest.work)), json.dumps(asdict(setting)), str(limit))
    if spawn(folder, MEASURE, *asked, threads=threads):
        print(f"{setting}: out of memory", flush=True)
        return None
    run = {"setting": str(setting)} | json.loads((folder / "run.json").read_text())
    if "seconds" in run:
        grown = run["peak_mib"] - run["baseline_mib"]
        print(f"{setting}: {shown(run['seconds'])} s, {grown:,.0f} MiB above the start", flush=True)
    return run


def largest(contest: Contest, one: Callable[[Setting], Run | None]) -> Sequence[Setting]:
    """The settings to measure; under a limit of memory the first that keeps within it."""
    if not contest.limit_gib:
        return contest.rivals
    if fits := next((setting for setting in contest.rivals if one(setting)), None):
        return [fits]
    raise SystemExit(f"no setting of TRL's fits into {contest.limit_gib:g} GiB")


def held(contest: Contest, repeats: int, threads: int, alone: bool) -> Iterator[dict[str, Any]]:
    """Reports of what was measured so far; the last one is whole."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(contest.work, Goal):
            time_to_reward.prepare(folder, contest.work)
        else:
            workloads.prepare(folder, contest.work)

        def one(setting: Setting, contest: Contest = contest) -> Run | None:
            return in_a_process(folder, contest, setting, threads)

        def surely(setting: Setting, contest: Contest = contest) -> Run:
            if run := one(setting, contest):
                return run
            raise SystemExit(f"{setting}: there is less memory than it needs")

        loaded = surely(LOADED)
        settings, runs = [] if alone else largest(contest, one), list[Run]()
        about = {"kind": contest.kind, "workload": described(contest.work, loaded), "limit_gib": contest.limit_gib}
        for seed in range(repeats):
            for rival in settings or [None]:
                runs += [surely(dataclasses.replace(setting, seed=seed)) for setting in contest.ours]
                if rival:
                    patient = with_patience(contest, runs[-len(contest.ours)])
                    runs.append(surely(dataclasses.replace(rival, seed=seed), patient))
                figures = summarise(runs, loaded["baseline_mib"]) | {"agreement": agreement(runs)}
                holds = {"holds": alike(figures["agreement"], contest.work) and not any(map(failed, runs))}
                yield about | {"loaded_mib": loaded["baseline_mib"]} | figures | holds | {"runs": runs}


def with_patience(contest: Contest, ours: Run) -> Contest:
    """The same for a rival, who gives up after so many times our seconds, if the race has a patience."""
    if not isinstance(contest.work, Goal) or not contest.work.patience:
        return contest
    limit = contest.work.patience * ours["seconds"]
    return dataclasses.replace(contest, work=dataclasses.replace(contest.work, limit=limit))


def failed(run: Run) -> bool:
    """Whether a run made all its steps and did not reach its goal."""
    return not run.get("reached", True) and not run.get("gave_up", False)


def described(work: Workload | Goal, loaded: Run) -> dict[str, Any]:
    """The work in numbers."""
    about = asdict(work) | {"parameters": loaded["parameters"]}
    if isinstance(work, Goal):
        return about
    lengths = {"completion_tokens": sum(work.lengths), "longest_completion": max(work.lengths)}
    return about | lengths | {"lora_r": LORA_R, "kl_coef": work.kl}


def summarise(runs: list[Run], common_mib: float) -> dict[str, Any]:
    """Medians of every setting, and ratios of ours to TRL's best in time and in each view of memory."""
    medians: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run["setting"] for run in runs):
        mine = [run for run in runs if run["setting"] == name]
        peak = median(run["peak_mib"] for run in mine)
        medians[name] = {
            "seconds": median(run["seconds"] for run in mine),
            "cpu_seconds": median(run["cpu_seconds"] for run in mine),
            "above_start_mib": median(run["peak_mib"] - run["baseline_mib"] for run in mine),
            "above_loaded_mib": peak - common_mib,
            "peak_mib": peak,
        }
        if "steps" in mine[0]:
            medians[name]["steps"] = median(run["steps"] for run in mine)
    first = medians[runs[0]["setting"]]
    others = {name: figures for name, figures in medians.items() if not name.startswith("ours")}
    best = {what: min(others, key=lambda name: others[name][what]) for what in HEADS if others}
    times = {what: others[best[what]][what] / first[what] for what in best}
    return {"medians": medians, "trl_best": best, "trl_over_ours": times}


def agreement(runs: list[Run]) -> dict[str, float]:
    """The largest relative difference of any run from the first, in what both sides should have alike."""
    first = runs[0]
    return {
        name: max(abs(run[name] - first[name]) / max(abs(first[name]), NEAR_ZERO) for run in runs)
        for name in ALIKE
        if name in first
    }


def alike(differences: dict[str, float], work: Workload | Goal) -> bool:
    """Whether both sides computed the same."""
    limits = ALIKE | (OF_SEQUENCES.get(work.algorithm, {}) if isinstance(work, Workload) else {})
    return all(difference <= limits[name] for name, difference in differences.items())


def shown(seconds: float) -> str:
    """Enough digits for milliseconds, and not for minutes."""
    return f"{seconds:,.1f}" if seconds >= 1 else f"{seconds:.3g}"


def table(report: dict[str, Any]) -> str:
    """The medians as a table, and what follows from them."""
    rows: list[tuple[str, ...]] = [("", "seconds", "CPU seconds", "MiB above start", "above loaded model", "in all")]
    for name, figures in report["medians"].items():
        rows.append((name, *(shown(figures[h]) if "seconds" in h else f"{figures[h]:,.0f}" for h in HEADS)))
    if ratios := report["trl_over_ours"]:
        rows.append(("TRL's best / ours", *(f"{ratios[h]:.1f}" for h in HEADS)))
    lines = aligned(rows, names=True)
    if differs := ", ".join(f"{name} {value:.1e}" for name, value in report["agreement"].items()):
        lines.append(f"largest relative difference of any run from the first: {differs}")
    steps = [f"{name} {figures['steps']:g}" for name, figures in report["medians"].items() if "steps" in figures]
    if steps:
        lines.append(f"steps: {'; '.join(steps)}")
    lines += [f"{run['setting']}: a run never got there" for run in report["runs"] if failed(run)]
    tired = [run for run in report["runs"] if run.get("gave_up")]
    lines += [f"{run['setting']}: a run gave up after {run['steps']} steps" for run in tired]
    return "\n".join(lines)
