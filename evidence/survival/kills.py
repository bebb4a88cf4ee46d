"""Killed at any moment, a run ends as if nothing had happened: SIGKILL, `--resume`, and so on until it is done.

    python -m evidence.survival.kills
    python -m evidence.survival.kills --engine hf --kills 5

The same small run twice: undisturbed, and killed at random moments: two in ten fall into its start, five into the steps
after the first new line of metrics, three are aimed at the writing of a checkpoint. Looked at after every kill: that no
process lives on, that nothing is left in shared memory or among temporary files, and that every file with a name is
whole. Looked at in the end: that both runs left the same. Linux only. Writes results/kills.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evidence.results import RESULTS, where, write
from evidence.survival.compare_runs import damage, differences, largest_gap, unlike_tensors
from nanorlhf.config import names
from nanorlhf.records import checkpoint
from nanorlhf.records.directory import read_lines
from nanorlhf.rewards.exact_answer import exact_answer
from nanorlhf.sandbox import run as sandbox

SAVE = 2  # steps from one checkpoint to the next, so that a kill can cost a whole step
BEGUN = "the first prompt as the model sees it"  # said when a run is about to take its first step
AIMS = {"start": 2, "steps": 5, "saving": 3}  # of ten kills
WITHIN = 6.0  # steps after the first new line in which a kill falls
PATIENCE = 10.0  # seconds in which nothing of a killed run may be left
KILLS = {"hf": 50, "vllm": 10}
TOLERANCE = {"hf": 0.0, "vllm": 1e-6}
PR_SET_CHILD_SUBREAPER = 36


def contained_answer(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """The usual reward, some of it told by a program in a sandbox."""
    told = []
    for completion, reward in zip(completions, exact_answer(completions, answer, **columns), strict=True):
        if len(str(completion)) % 4 == 0:
            told.append(float(sandbox.run(f"print({reward})", method=sandbox.find_method()).stdout))
        else:
            told.append(float(reward or 0))
    return told


@dataclass(frozen=True, slots=True)
class Usual:
    """The figures of the run that nobody kills."""

    start: float  # seconds until the first line of metrics
    cycle: float  # from one step to the next
    saving: float  # from a step's line to the end of its checkpoint
    leftovers: set[str]  # temporary files: caches


@dataclass(slots=True)
class Killed:
    """The findings after the kills."""

    phases: Counter[str] = field(default_factory=Counter)
    in_a_checkpoint: int = 0  # kills that left half a checkpoint
    seconds_to_end: list[float] = field(default_factory=list)  # until no process of the run was left
    left: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


class Launch:
    """A process of the run, and what it has said."""

    def __init__(self, words: list[str], run: Path, temporary: Path) -> None:
        self.run, self.log = run, temporary.parent / "log.txt"
        self.began = time.monotonic()
        with self.log.open("w") as out:
            environment = os.environ | {"TMPDIR": str(temporary)}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nanorlhf", *words], stdout=out, stderr=subprocess.STDOUT, env=environment
            )

    def wait_for(self, happened: Callable[[], bool], seconds: float = float("inf")) -> bool:
        """Whether it happened, before the process ended and the time was up."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if happened():
                return True
            time.sleep(0.005)
        return False

    def has_begun(self) -> bool:
        return BEGUN in self.log.read_text(errors="replace")

    def lines(self) -> int:
        """Bytes of metrics, which grow by a line a step."""
        path = self.run / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def first_line(self) -> bool:
        """Waits for the first new line of metrics; False if the process ended before."""
        if not self.wait_for(self.has_begun):
            return False
        before = 0 if names.latest(self.run) is None else self.lines()
        return self.wait_for(lambda: self.lines() > before)

    def saves(self) -> bool:
        """Waits until it is about to write a checkpoint."""
        return self.first_line() and self.wait_for(lambda: unsaved(self.run))

    def finish(self) -> None:
        """Waits for the end, which must be a good one."""
        if self.process.wait():
            raise RuntimeError(f"the run failed: {self.log.read_text(errors='replace')}")


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes; gives 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=KILLS, nargs="+", default=[*KILLS], help="(default: both)")
    parser.add_argument("--kills", type=int, help="(default: 50 with hf, 10 with vllm)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=RESULTS / "kills.json")
    args = parser.parse_args(argv)
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    for engine in args.engine:
        with tempfile.TemporaryDirectory() as folder, adopting():
            figures = measured(Path(folder), engine, args.kills or KILLS[engine], random.Random(args.seed))
        known[engine] = figures | where()
        write(args.output, known)
        print(json.dumps(figures, indent=1), flush=True)
    return int(not all(known[engine]["as_if_nothing_had_happened"] for engine in args.engine))


def measured(folder: Path, engine: str, kills: int, draw: random.Random) -> dict[str, Any]:
    """Both runs, and what became of the one that was killed."""
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    words = command(engine, steps=6 * kills)
    usual = undisturbed_run([*words, "--output_dir", str(undisturbed)], undisturbed, folder)
    began, found = time.monotonic(), Killed()
    for number in range(kills):
        (aim,) = draw.choices([*AIMS], [*AIMS.values()])
        longest = {"start": usual.start, "steps": WITHIN * usual.cycle, "saving": 1.5 * usual.saving}[aim]
        if not kill(words, killed, folder, aim, draw.uniform(0, longest), usual, found):
            break
        print(f"kill {number + 1}: {dict(found.phases)}, step {step_of(killed)}", flush=True)
    launch = Launch(resumed(words, killed), killed, emptied(folder / "tmp"))
    launch.finish()
    found.damaged += damage(killed, ended=True) + damage(undisturbed, ended=True)
    unlike = differences(undisturbed, killed, TOLERANCE[engine])
    figures = {
        "kills": found.phases.total(),
        "moments": dict(found.phases),
        "kills_that_left_half_a_checkpoint": found.in_a_checkpoint,
        "steps": len(read_lines(killed / "metrics.jsonl")) - 1,
        "largest_difference_of_losses": largest_gap(undisturbed, killed, "loss"),
        "adapter_bit_identical": not unlike_tensors(undisturbed, killed),
        "differences": unlike,
        "damaged_files": found.damaged,
        "left_behind": found.left,
        "most_seconds_until_every_process_had_ended": max(found.seconds_to_end, default=None),
        "seconds": time.monotonic() - began,
    }
    fine = not (unlike or found.damaged or found.left) and figures["kills"] == kills
    return {"as_if_nothing_had_happened": fine} | figures


def command(engine: str, steps: int) -> list[str]:
    """A small run in which everything takes part: workers, sandboxes, evaluations, checkpoints."""
    options = {"engine": engine, "max_steps": steps, "save_steps": SAVE, "prompts_per_step": 4, "num_generations": 4}
    options |= {"eval_steps": 10, "eval_prompts": 8, "max_completion_length": 16, "reward_workers": 2}
    options |= {"reward_funcs": f"{Path(__file__).resolve()}:contained_answer"}
    return [
        "grpo",
        "--recipe",
        "tiny",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]


def undisturbed_run(words: list[str], run: Path, folder: Path) -> Usual:
    """The run as it should be."""
    temporary = emptied(folder / "tmp")
    launch = Launch(words, run, temporary)
    seen, start, first = launch.first_line(), time.monotonic() - launch.began, time.time()
    launch.finish()
    assert seen, "a run without a line"
    last, saved = ((run / name).stat().st_mtime for name in ("metrics.jsonl", "checkpoints/latest"))
    cycle = (last - first) / read_lines(run / "metrics.jsonl")[-1]["step"]
    return Usual(start, cycle, saved - last, {path.name for path in temporary.iterdir()})


def kill(words: list[str], run: Path, folder: Path, aim: str, delay: float, usual: Usual, found: Killed) -> bool:
    """Starts the run or goes on with it, kills it, and looks at what is left; False if it had ended by itself."""
    temporary, shared = emptied(folder / "tmp"), {*Path("/dev/shm").iterdir()}  # noqa: S108
    launch = Launch(resumed(words, run), run, temporary)
    if aim == "start" or (launch.saves() if aim == "saving" else launch.first_line()):
        launch.wait_for(lambda: False, delay)
    if launch.process.poll() is not None:
        launch.finish()
        return False
    launch.process.kill()
    at = time.time()
    launch.process.wait()
    found.phases[phase(launch, at)] += 1
    found.in_a_checkpoint += any((run / "checkpoints").glob(".step_*.draft"))
    found.seconds_to_end.append(gone(found.left))
    found.left += [str(path) for path in temporary.iterdir() if path.name not in usual.leftovers]
    found.left += [str(path) for path in {*Path("/dev/shm").iterdir()} - shared if not in_use(path)]  # noqa: S108
    found.damaged += damage(run, ended=False)
    return True


def resumed(words: list[str], run: Path) -> list[str]:
    """The words that a user types: the same command if nothing was begun, else that it goes on."""
    return ["grpo", "--resume", str(run)] if (run / "config.yaml").exists() else [*words, "--output_dir", str(run)]


def emptied(folder: Path) -> Path:
    """A folder for temporary files, without any."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def step_of(run: Path) -> int:
    return checkpoint.step_of(names.latest(run))


def unsaved(run: Path) -> bool:
    """Whether the newest line is of a step whose checkpoint is not there yet."""
    rows = read_lines(run / "metrics.jsonl")
    return bool(rows) and rows[-1]["step"] % SAVE == 0 and rows[-1]["step"] > step_of(run)


def phase(launch: Launch, at: float) -> str:
    """The phase of a run at the time `at`, found from what it left."""
    if not launch.has_begun():
        return "start"
    rows = read_lines(launch.run / "metrics.jsonl")
    if not rows or "time/step" not in rows[-1]:
        return "first step"
    if unsaved(launch.run):
        return "saving"
    last = rows[-1]
    events = [launch.run / name for name in ("metrics.jsonl", "checkpoints/latest", "learning_curve.png")]
    since = at - max(path.stat().st_mtime for path in events if path.exists())
    return "rollout" if since < last["time/rollout"] + last["time/reward"] else "update"


def gone(left: list[str]) -> float:
    """Seconds until no process of a killed run was left; those that stayed are noted, and ended."""
    began, late = time.monotonic(), dict[int, str]()
    while alive := dict(descendants(os.getpid())):
        if time.monotonic() - began > PATIENCE:
            late = alive | late
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for pid in alive:
            with suppress(ChildProcessError):  # it is not ours yet
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    left += [f"process {pid}: {words}" for pid, words in late.items()]
    return time.monotonic() - began


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """Every process below this one, with its command line."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    todo = children.get(pid, [])
    while todo:
        child = todo.pop()
        todo += children.get(child, [])
        with suppress(OSError):
            yield child, Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def in_use(path: Path) -> bool:
    """Whether a process that lives has this file in its memory: then it is another program's."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if str(path) in maps.read_text(errors="replace"):
                return True
    return False


@contextmanager
def adopting() -> Iterator[None]:
    """Orphans below this process become its children, so that none can hide."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)


if __name__ == "__main__":
    sys.exit(main())
