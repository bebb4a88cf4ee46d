"""Which algorithm, at what cost? Runs the same task by several, seed after seed, and says what is more than noise.

    python -m scripts.compare grpo ppo rloo remax raft reinforce --recipe tiny --steps 60
    python -m scripts.compare grpo grpo:dapo grpo:num_generations=16,learning_rate=0.001 --minutes 30 --engine hf

An entry is an algorithm, and after a colon recipes to lay over --recipe, and options of its own. Whatever else is said
goes to every run. Each run is a process of its own; what is there already is not run again, and what was cut off goes
on, so the same command may be given until all is done.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.cli import parse
from nanorlhf.config.aliases import ALIASES, rename
from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError, nearest
from nanorlhf.records.directory import OWN, RunRecord, read_run, training_seconds
from nanorlhf.system.signals import terminating_as_ctrl_c

if TYPE_CHECKING:
    from nanorlhf.scripts.comparing.verdicts import Run

OURS = {  # what a comparison decides itself, and how to say it
    "seed": "--seeds",
    "max_steps": "--steps",
    "num_train_epochs": "--steps",
    "max_minutes": "--minutes",
    "output_dir": "--output",
    "resume": "nothing: what was cut off goes on by itself",
    "overwrite_output_dir": "another --output",
}
ALIKE = (  # what a reward is earned for; between entries that differ here it means different things
    "dataset_name",
    "dataset_config",
    "dataset_test_name",
    "dataset_test_config",
    "dataset_test_split",
    "eval_prompts",
    "reward_funcs",
    "reward_weights",
    "reward_options",
    "environment",
)
ENDLESS = 1_000_000  # steps, if minutes decide
EVALUATIONS = 15  # in a run, if nothing is said


@dataclass(frozen=True, slots=True)
class Entry:
    """One side of a comparison: an algorithm with its recipes and options."""

    name: str
    algorithm: str
    words: tuple[str, ...]  # its command line
    config: TrainConfig
    samples: int  # completions in a step

    def with_options(self, **options: Any) -> Entry:
        """The same with options below those that were said."""
        said = names(self.words)
        new = {name: value for name, value in options.items() if name not in said}
        words = [word for name, value in new.items() for word in (f"--{name}", str(value))]
        return replace(self, words=(*self.words, *words), config=replace(self.config, **new))


@dataclass(frozen=True, slots=True)
class Job:
    """One run of an entry."""

    entry: Entry
    seed: int
    folder: Path

    @property
    def config(self) -> TrainConfig:
        return replace(self.entry.config, seed=self.seed, output_dir=str(self.folder))

    @property
    def words(self) -> list[str]:
        """The words after `python -m nanorlhf`."""
        return [self.entry.algorithm, *self.entry.words, "--seed", str(self.seed), "--output_dir", str(self.folder)]

    def begun(self) -> bool:
        """Whether there is something to go on with; what was made with other options is refused."""
        path = self.folder / "config.yaml"
        if not path.exists():
            return False
        asked = yaml.safe_load(yaml.safe_dump(self.config.to_dict()))
        for name, value in rename(yaml.safe_load(path.read_text()), asked).items():
            if name not in OWN and value != asked.get(name):
                raise UsageError(
                    f"{self.folder} was made with {name}={value!r}, and now {asked.get(name)!r} is asked for: "
                    "choose another --output"
                )
        return True

    def finished(self) -> bool:
        """Whether it came to its end."""
        if not self.begun() or not (self.folder / "run.json").exists():
            return False
        rows = self.record().rows
        return bool(rows) and self.config.over(rows[-1]["step"], training_seconds(rows))

    def record(self) -> RunRecord:
        """Reads the files that it has left."""
        return read_run(self.folder)

    def result(self, record: RunRecord) -> Run:
        """Gives what is kept of its record."""
        from nanorlhf.scripts.comparing.verdicts import read

        return read(record, self.entry.name, f"python -m {shlex.join(self.words[:-2])}")


@terminating_as_ctrl_c()  # not without the run that is under way
def main(argv: list[str] | None = None) -> int:
    """Runs what is missing and publishes; gives 0 (all is there), 1 (a run failed), 2 (a mistake) or 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    first = next((at for at, word in enumerate(argv) if word.startswith("-")), len(argv))
    args, rest = parser.parse_known_args(argv[first:])
    try:
        jobs = plan(argv[:first], args, rest)
        failed = run_all(jobs, args.output)
        print(f"\n{publish_finished(jobs, args.output)}")
    except UsageError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncompare: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """The options that are not those of runs."""
    parser = argparse.ArgumentParser(
        prog="nanorlhf compare",
        usage="%(prog)s ENTRY [ENTRY ...] [--steps N | --samples N | --minutes M] [--seeds K] [--OPTION VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="steps of each run (default: the most that an entry's recipe has)")
    budget.add_argument("--samples", type=int, help="or completions that each run may score")
    budget.add_argument("--minutes", type=float, help="or minutes of training; the learning rate is then constant")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each entry (default: 3, the least that can tell)")
    parser.add_argument("--recipe", default="tiny", help="where every entry starts (default: tiny)")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder (default: %(default)s)")
    return parser


def plan(texts: Sequence[str], args: argparse.Namespace, rest: Sequence[str]) -> list[Job]:
    """Every run, after everything was looked at that can be wrong."""
    if not texts:
        raise UsageError(
            "name what is to be compared, before any option: compare grpo rloo:num_generations=16 --seeds 3"
        )
    for name in ("seeds", "steps", "samples", "minutes"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name} {value} cannot work: it must be above 0")
    entries = [read_entry(text, args.recipe, rest) for text in texts]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise UsageError(f"{twice!r} is named twice; entries must differ")
    for entry in entries[1:]:
        for name in ALIKE:
            values = [getattr(one.config, name, None) for one in (entries[0], entry)]
            if values[0] != values[1]:
                raise UsageError(
                    f"{entries[0].name} and {entry.name} differ in {name} ({values[0]!r}, {values[1]!r}), "
                    "so their rewards cannot be compared; give it once for all"
                )
    entries = with_budget(entries, args)
    runs = args.output / "runs"
    return [
        Job(entry, seed, runs / f"{safe(entry.name)}-seed{seed}") for seed in range(args.seeds) for entry in entries
    ]


def read_entry(text: str, recipe: str, rest: Sequence[str]) -> Entry:
    """`algorithm:recipe,option=value`, checked as its own command would check it."""
    from nanorlhf import preflight  # which imports torch, and --help is quick without
    from nanorlhf.algorithm import OnPolicy

    algorithm, _, details = text.partition(":")
    if algorithm not in ALGORITHMS:
        raise UsageError(f"unknown algorithm {algorithm!r}: {nearest(algorithm, ALGORITHMS)}")
    parts = [part for part in re.split(r",(?![^\[{]*[\]}])", details) if part]
    options = [part for part in parts if re.match(r"[\w-]+=", part)]
    recipes = [name for name in [*recipe.split(","), *(part for part in parts if part not in options)] if name]
    words = [*(["--recipe", ",".join(recipes)] if recipes else []), *rest, *(f"--{option}" for option in options)]
    if taken := next((name for name in names(words) if name in OURS), None):
        raise UsageError(f"{text}: a comparison sets {taken} itself; say {OURS[taken]}")
    package = importlib.import_module(f"nanorlhf.{algorithm}")
    config_class = getattr(package, next(name for name in package.__all__ if name.endswith("Config")))
    trainer = getattr(package, next(name for name in package.__all__ if name.endswith("Trainer")))
    try:
        _, config = parse(config_class, algorithm, Path(package.__path__[0]) / "recipes", words)
        entered = preflight.check(config, None, None, None, None, trainer.reader, trainer.algorithm_class)
    except UsageError as error:
        raise UsageError(f"{text}: {error}") from None
    words += ["--num_train_epochs", "null"] if config.num_train_epochs else []  # of a recipe: the budget is ours
    if not entered.rewards:
        raise UsageError(f"{text}: without reward_funcs there is no reward to compare")
    made = entered.algorithm(config)
    each = made.samples().each + made.samples().greedy if isinstance(made, OnPolicy) else made.together
    return Entry(text, algorithm, tuple(words), entered.config, each * config.prompts_per_step)


def names(words: Sequence[str]) -> list[str]:
    """The options that a command line sets, under the names they have here."""
    said = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    return [getattr(ALIASES.get(name), "name", name) for name in said]


def with_budget(entries: Sequence[Entry], args: argparse.Namespace) -> list[Entry]:
    """The same budget for all, with evaluations enough to draw a curve and checkpoints that it can go on from."""
    most = args.steps or max(entry.config.max_steps for entry in entries)
    made: list[Entry] = []
    for entry in entries:
        if args.minutes:
            options = {"max_steps": ENDLESS, "max_minutes": args.minutes, "lr_scheduler_type": "constant"}
            made.append(entry.with_options(**options))
        else:
            steps = -(-args.samples // entry.samples) if args.samples else most
            made.append(entry.with_options(max_steps=steps, eval_steps=-(-steps // EVALUATIONS)))
    return made


def safe(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")


def run_all(jobs: Sequence[Job], output: Path) -> list[Job]:
    """One after the other, seed by seed, with results after each seed but the last; gives those that failed."""
    (output / "logs").mkdir(parents=True, exist_ok=True)
    todo, failed, took = [job for job in jobs if not job.finished()], [], 0.0
    print(f"{len(jobs)} runs in {output}, {len(jobs) - len(todo)} of them finished", flush=True)
    for number, job in enumerate(todo):
        start = time.perf_counter()
        code = run(job, output / "logs" / f"{job.folder.name}.log")
        took += time.perf_counter() - start
        left = f"{len(todo) - number - 1} left, about {took / (number + 1) * (len(todo) - number - 1) / 60:.0f} min"
        if code or not job.finished():
            failed.append(job)
            print(f"{job.folder.name}: failed ({code}): {last_line(output, job)}; {left}", flush=True)
        else:
            print(f"{job.folder.name}: {outcome(job.result(job.record()))}; {left}", flush=True)
        if number + 1 < len(todo) and todo[number + 1].seed > job.seed:
            publish_finished(jobs, output)
    return failed


def run(job: Job, log: Path) -> int:
    """A fresh process; Ctrl-C here lets it finish its step and save, a second one ends it."""
    words = [job.entry.algorithm, "--resume", str(job.folder)] if job.begun() else job.words
    with log.open("a") as out:
        # In a process group of its own: Ctrl-C reaches it once, from us.
        child = subprocess.Popen(
            [sys.executable, "-m", "nanorlhf", *words], stdout=out, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            return child.wait()
        except KeyboardInterrupt:
            print(f"\nending {job.folder.name} after its step", flush=True)
            child.send_signal(signal.SIGINT)
            while child.poll() is None:
                try:
                    child.wait()
                except KeyboardInterrupt:
                    child.send_signal(signal.SIGINT)
            raise


def publish_finished(jobs: Sequence[Job], output: Path) -> str:
    """Everything that can be said of the runs that are finished, written down and given in short."""
    finished = [job for job in jobs if job.finished()]
    order = list(dict.fromkeys(job.entry.name for job in jobs))
    finished.sort(key=lambda job: order.index(job.entry.name))
    from nanorlhf.scripts.comparing.publish import publish

    if not finished:
        return "no run is finished, so there is nothing to compare"
    records = [job.record() for job in finished]
    return publish([job.result(record) for job, record in zip(finished, records, strict=True)], records, output)


def outcome(run: Run) -> str:
    """A run in a line."""
    first, last = run.curve["reward"][0], run.curve["reward"][-1]
    return f"reward {first:.3f} -> {last:.3f} in {run.seconds:.0f} s of training"


def last_line(output: Path, job: Job) -> str:
    """The last error of a run, or else its last line, and where there is more."""
    log = output / "logs" / f"{job.folder.name}.log"
    lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()] if log.exists() else []
    errors = [line for line in lines if ": error: " in line]
    return f"{(errors or lines or ['no word'])[-1]} (all of it: {log})"


if __name__ == "__main__":
    sys.exit(main())
