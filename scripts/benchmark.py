"""Measures our update against TRL's on the same rollouts, and against itself: `python -m scripts.benchmark`.

The update is everything between completions and new weights: reference log-probabilities, forward, backward, optimizer
step. Every measurement has a process of its own, so that its peak of memory is its own, and what is compared
alternates, so that a busy machine slows all of it.

update: skewed lengths. TRL is measured with every one of its settings below, and its quickest is compared in time, its
smallest in memory. outlier: one completion of 4,096 tokens among 31 short ones; TRL at the largest micro-batch that
stays below a limit of memory. In both, both sides start cold and do one update.
linearity: our own side with 1, 2 and 4 times as many short samples. dropping: with a growing share of groups without
spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from nanorlhf.scripts import scaling
from nanorlhf.scripts.workloads import LORA_R, RATE, Meter, Run, Workload, disturb, memory, prepare, update_ours

ROOT = Path(__file__).resolve().parent.parent
ALIKE = 1e-3  # losses and gradient norms may differ by this share; float32 sums in another order differ by less
MEASURE = "import sys; from nanorlhf.scripts.benchmark import measure; measure(*sys.argv[1:])"
MEASURE_OURS = "import sys; from nanorlhf.scripts.scaling import measure_ours; measure_ours(*sys.argv[1:])"
FULL = ("can't allocate memory", "MemoryError", "bad_alloc", "Cannot allocate memory")

TINY = Workload(hidden=16, intermediate=32, layers=1, heads=2, vocabulary=64, median_length=8, longest=32)
SIZES = {"full": Workload(), "tiny": TINY}
OUTLIER = {
    "full": Workload(median_length=96, sigma=0.5, longest=256, outlier=4096),
    "tiny": Workload(
        hidden=16, intermediate=32, layers=1, heads=2, vocabulary=64, median_length=8, longest=16, outlier=64
    ),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Who updates, and how."""

    side: str  # ours, trl, or loaded: the model alone, which both start from
    micro_batch: int = 0
    checkpointing: bool = False

    def __str__(self) -> str:
        if self.side != "trl":
            return self.side
        return f"trl, micro-batch {self.micro_batch}{', checkpointing' * self.checkpointing}"


OURS, LOADED = Setting("ours"), Setting("loaded")
TRL = [Setting("trl", micro_batch, checkpointing) for micro_batch in (8, 32) for checkpointing in (False, True)]
DESCENDING = [Setting("trl", size, checkpointing) for size in (32, 16, 8, 4, 2, 1) for checkpointing in (False, True)]


def update_trl(folder: Path, work: Workload, samples: Sequence[dict[str, Any]], setting: Setting) -> Run:
    """One step of TRL's GRPOTrainer from the moment it has its completions; float32 and token mean, as ours."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config  # type: ignore[import-not-found]

    meter, measured = Meter(), {}

    def given(*_: Any) -> dict[str, list[Any]]:
        columns = {name: [s[name] for s in samples] for name in samples[0]}
        meter.start()
        return columns

    class AtTheEnd(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            measured.update(meter.stop())

    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda reward, **_: reward,
        rollout_func=given,
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * work.prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=get_peft_config(
            ModelConfig(
                use_peft=True, lora_r=LORA_R, lora_alpha=LORA_R, lora_dropout=0.0, lora_target_modules=["all-linear"]
            )
        ),
        callbacks=[AtTheEnd()],
        args=GRPOConfig(
            output_dir=str(folder / "trl"), use_cpu=True, bf16=False, max_steps=1, learning_rate=RATE,
            per_device_train_batch_size=setting.micro_batch,
            gradient_accumulation_steps=len(samples) // setting.micro_batch,
            gradient_checkpointing=setting.checkpointing,
            num_generations=work.generations, max_completion_length=work.limit,
            beta=work.kl, use_bias_correction_kl=False, loss_type="dapo", scale_rewards="group",
            logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    disturb(trainer.model)
    trainer.train()
    return measured | {name: trainer.state.log_history[0][name] for name in ("loss", "grad_norm")}


def load_only(folder: Path) -> Run:
    """The memory that the libraries and the model take before anyone trains it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {"baseline_mib": memory()[0], "parameters": model.num_parameters()}


def measure(folder: str, work: str, setting: str, limit_gib: str, threads: str) -> None:
    """What a process of its own does: one update, its figures into `folder`."""
    import torch

    torch.set_num_threads(int(threads))
    path, given, how = Path(folder), Workload(**json.loads(work)), Setting(**json.loads(setting))
    samples = json.loads((path / "rollout.json").read_text())
    if float(limit_gib):
        limit = int(float(limit_gib) * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if how == LOADED:
        run = load_only(path)
    else:
        run = update_ours(path, given, samples) if how == OURS else update_trl(path, given, samples, how)
    (path / "run.json").write_text(json.dumps(run))


def spawn(folder: Path, code: str, *arguments: str, threads: int) -> str | None:
    """Runs `code` in a process of its own; what it said if it ran out of memory, and the end if it failed otherwise."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(folder), *arguments, str(threads)]
    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if not ended.returncode:
        return None
    if any(words in ended.stderr for words in FULL) or ended.returncode == -9:
        return ended.stderr
    raise SystemExit(f"{arguments} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")


def in_a_process(folder: Path, work: Workload, setting: Setting, threads: int, limit_gib: float = 0.0) -> Run | None:
    """One measurement; None where there was less memory than it needs."""
    asked = (json.dumps(asdict(work)), json.dumps(asdict(setting)), str(limit_gib))
    if spawn(folder, MEASURE, *asked, threads=threads):
        print(f"{setting}: out of memory", flush=True)
        return None
    run = {"setting": str(setting)} | json.loads((folder / "run.json").read_text())
    if "seconds" in run:
        grown = run["peak_mib"] - run["baseline_mib"]
        print(f"{setting}: {run['seconds']:.1f} s, {grown:,.0f} MiB above the start", flush=True)
    return run


def ours_in_a_process(folder: Path, work: Workload, threads: int) -> Run:
    """One warm update of ours."""
    if said := spawn(folder, MEASURE_OURS, json.dumps(asdict(work)), threads=threads):
        raise SystemExit(said)
    run = json.loads((folder / "run.json").read_text())
    print(f"{work.prompts} prompts, {work.flat} flat: {run['cpu_seconds']:.1f} CPU s", flush=True)
    return run


def summarise(runs: list[Run], common_mib: float) -> dict[str, Any]:
    """Medians of every setting, and ratios of ours to TRL's best in time and in each view of memory."""
    medians: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run["setting"] for run in runs):
        mine = [run for run in runs if run["setting"] == name]
        peaks = [run["peak_mib"] for run in mine]
        medians[name] = {
            "seconds": median(run["seconds"] for run in mine),
            "cpu_seconds": median(run["cpu_seconds"] for run in mine),
            "above_start_mib": median(run["peak_mib"] - run["baseline_mib"] for run in mine),
            "above_loaded_mib": median(peaks) - common_mib,
            "peak_mib": median(peaks),
        }
    ours = medians[str(OURS)]
    others = {name: figures for name, figures in medians.items() if name != str(OURS)}
    best = {what: min(others, key=lambda name: others[name][what]) for what in ours if others}
    times = {what: others[best[what]][what] / ours[what] for what in best}
    return {"medians": medians, "trl_best": best, "trl_over_ours": times}


def agreement(runs: list[Run]) -> dict[str, float]:
    """The largest relative difference of any run from the first."""
    return {name: max(abs(run[name] / runs[0][name] - 1) for run in runs) for name in ("loss", "grad_norm")}


def table(report: dict[str, Any]) -> str:
    """The medians as a table, and what follows from them."""
    heads = ("seconds", "cpu_seconds", "above_start_mib", "above_loaded_mib", "peak_mib")
    rows: list[tuple[str, ...]] = [("", "seconds", "CPU seconds", "MiB above start", "above loaded model", "in all")]
    for name, figures in report["medians"].items():
        rows.append((name, *(f"{figures[h]:,.1f}" if "seconds" in h else f"{figures[h]:,.0f}" for h in heads)))
    ratios = report["trl_over_ours"]
    if ratios:
        rows.append(("TRL's best / ours", *(f"{ratios[h]:.1f}" for h in heads)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    ]
    differs = ", ".join(f"{name} {value:.1e}" for name, value in report["agreement"].items())
    return "\n".join([*lines, f"largest relative difference of any run from the first: {differs}"])


def about(threads: int) -> dict[str, Any]:
    """When, where and with which versions."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", cpuinfo)
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    machine = {
        "cpu": found[1] if found else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
    }
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "commit": commit or "unknown", "machine": machine, "versions": versions}


def update(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Skewed lengths, every setting of TRL's."""
    yield from contest(options, SIZES[options.size], lambda one: TRL)


def outlier(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One long answer among short ones, TRL at the largest micro-batch that fits."""

    def largest(one: Callable[[Setting], Run | None]) -> list[Setting]:
        fits = (setting for setting in DESCENDING if one(setting))
        return [next(fits)]

    yield from contest(options, OUTLIER[options.size], largest, options.limit_gib)


def contest(
    options: argparse.Namespace,
    work: Workload,
    choose: Callable[[Callable[[Setting], Run | None]], Sequence[Setting]],
    limit_gib: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Reports of what was measured so far; the last one is whole."""
    lengths = work.lengths
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, work)

        def one(setting: Setting) -> Run | None:
            return in_a_process(folder, work, setting, options.threads, limit_gib if setting.side == "trl" else 0.0)

        def surely(setting: Setting) -> Run:
            if run := one(setting):
                return run
            raise SystemExit(f"{setting}: less memory than at first")

        loaded = surely(LOADED)
        rivals, runs = [] if options.alone else choose(one), list[Run]()
        workload = asdict(work) | {
            "parameters": loaded["parameters"], "completion_tokens": sum(lengths), "longest_completion": max(lengths),
            "lora_r": LORA_R, "kl_coef": work.kl,
        }  # fmt: skip
        for _ in range(options.repeats):
            for rival in rivals or [None]:
                runs += [surely(OURS)] + ([surely(rival)] if rival else [])
                figures = summarise(runs, loaded["baseline_mib"]) | {"agreement": agreement(runs)}
                holds = all(difference < ALIKE for difference in figures["agreement"].values())
                report = {"workload": workload, "loaded_mib": loaded["baseline_mib"], "limit_gib": limit_gib}
                yield report | figures | {"holds": holds, "runs": runs}


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "update": update,
    "outlier": outlier,
    "linearity": lambda options: scaling.linearity(options, ours_in_a_process),
    "dropping": lambda options: scaling.dropping(options, ours_in_a_process),
}
RIVALRIES = ("update", "outlier")
REPEATS = {"update": 3, "outlier": 3, "linearity": 5, "dropping": 5}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="nanorlhf benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", default=list(BENCHMARKS), help="Default: all.")
    parser.add_argument("--repeats", type=int, default=None, help=f"Measurements of each setting (default: {REPEATS}).")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="For both sides (default: all cores).")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny only shows that it works.")
    parser.add_argument("--alone", action="store_true", help="Measure our side only, without TRL.")
    parser.add_argument("--limit_gib", type=float, default=20.0, help="TRL's memory in outlier (default: 20).")
    parser.add_argument("--output", type=Path, default=Path("results"), help="Folder (default: results).")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures, writes results/benchmark_<name>.json as figures come in, prints a table; 1 where something is off."""
    options = parse(argv)
    if not options.alone and set(options.only) & set(RIVALRIES) and find_spec("trl") is None:
        print("nanorlhf benchmark: error: TRL is not installed: pip install -e .[bench], or --alone", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    everything_holds = True
    for name in options.only:
        now = argparse.Namespace(**vars(options) | {"repeats": options.repeats or REPEATS[name]})
        path, described, report = options.output / f"benchmark_{name}.json", about(options.threads), {}
        for report in BENCHMARKS[name](now):
            path.write_text(json.dumps({"benchmark": name} | described | report, indent=1) + "\n")
        print(f"\n{table(report) if name in RIVALRIES else scaling.as_table(report)}\n-> {path}")
        everything_holds &= report["holds"]
    return 0 if everything_holds else 1


if __name__ == "__main__":
    sys.exit(main())
