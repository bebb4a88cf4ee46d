"""The run directory: made with care, never overwritten unasked, and read back to show or compare runs."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nanorlhf.config.names import CHECKPOINTS, run_of
from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError
from nanorlhf.system.files import write_whole
from nanorlhf.system.terminal import log
from nanorlhf.system.versions import versions

OWN = {"resume", "output_dir", "overwrite_output_dir"}  # options that say where a run is, not what it does
FIXED = {"algorithm", "model_name_or_path", "adapter_name_or_path", "lora", "lora_r", "lora_alpha", "use_rslora"}
FIXED |= {"dataset_name", "dataset_config", "dataset_train_split", "prompts_per_step", "num_generations", "seed"}
FIXED |= {"updates_per_step", "epochs_per_step", "critic_model_name_or_path"}
UNBEGUN = {"run.json", ".run.json.draft", ".config.yaml.draft"}  # all that is left of a run killed as it began
BEGINNING = {
    "config.yaml",
    CHECKPOINTS,
    "metrics.jsonl",
    "samples.jsonl",
    "base_model",
}  # and of one before its first step
BEGINNING |= {"trackers.json", "wandb", "tensorboard"}
_held: dict[Path, int] = {}  # the runs that this process has, by their open folders


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The record that a run has left so far."""

    folder: Path
    algorithm: str
    options: dict[str, Any]
    about: dict[str, Any]  # versions of libraries, the machine, when it began
    rows: list[dict[str, Any]]  # its metrics, an evaluation before the first step among them

    @property
    def name(self) -> str:
        return self.options["run_name"] or self.folder.name

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.rows if "time/step" in row]


def read_run(folder: Path) -> RunRecord:
    """A run that ended, or goes on, or broke off in the middle of a line."""
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{str(folder)!r} is no run directory: there is no config.yaml")
    about = folder / "run.json"
    if not about.is_file():
        raise UsageError(f"{str(folder)!r} says nothing of its algorithm: there is no run.json")
    facts = json.loads(about.read_text())
    options = yaml.safe_load((folder / "config.yaml").read_text())
    return RunRecord(folder, facts.pop("algorithm"), options, facts, read_lines(folder / "metrics.jsonl"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none if there is no such file."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # text has more ends of lines than JSON has
    return [json.loads(line) for line in lines]


def machine() -> str:
    """The machine in words."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def algorithm_of(run: Path) -> str | None:
    """The algorithm that came with the package and made a run; None for a user's own, and if nothing says so."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        own = yaml.safe_load((run / "config.yaml").read_text()).get("algorithm")
        return None if own else json.loads((run / "run.json").read_text())["algorithm"]
    return None


def prepare(config: TrainConfig, algorithm: str) -> Path:
    """The directory of this run, new or to be continued, with its options in `config.yaml`."""
    resumed = run_of(config.resume) if config.resume else None
    run = Path(config.output_dir or resumed or f"runs/{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume and not (run / "config.yaml").is_file():
        raise UsageError(
            f"resume={config.resume!r}: there is no run to continue ({run / 'config.yaml'} does not exist)"
        )
    try:
        if run.is_dir() and not hold(run):
            raise UsageError(f"output_dir={str(run)!r}: another process trains there; wait for its end, or end it")
        if run.is_dir() and not config.resume and {path.name for path in run.iterdir()} - UNBEGUN:
            clear(run, config.overwrite_output_dir or without_a_step(run), config)
        write_head(run, config, algorithm)
        hold(run)
    except UsageError:
        release(run)
        raise
    except OSError as error:
        raise UsageError(f"output_dir={str(run)!r} cannot be written: {error.strerror}") from None
    return run


def write_head(run: Path, config: TrainConfig, algorithm: str) -> None:
    """The files by which a run is known."""
    run.mkdir(parents=True, exist_ok=True)
    options = config.to_dict() | {"resume": None, "output_dir": str(run)}
    if config.resume:
        check_changes(read_run(run), options, algorithm)
    else:
        about = {"algorithm": algorithm, "machine": machine(), "began": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_whole(run / "run.json", json.dumps(about | {"versions": versions()}, indent=1) + "\n")
    write_whole(run / "config.yaml", yaml.safe_dump(options, sort_keys=False))  # last: by this a run is known
    (run / CHECKPOINTS).mkdir(exist_ok=True)


def check_changes(before: RunRecord, options: dict[str, Any], algorithm: str) -> None:
    """Says which options a run goes on with other than before; refuses those under which it would be another run."""
    changes = {
        k: f"{k} from {before.options.get(k)!r} to {v!r}"
        for k, v in options.items()
        if k not in OWN and v != before.options.get(k)
    }
    if algorithm != before.algorithm:
        changes["algorithm"] = f"algorithm from {before.algorithm!r} to {algorithm!r}"
    if fixed := [words for k, words in changes.items() if k in FIXED]:
        raise UsageError(
            f"{', '.join(fixed)}: with this the checkpoint of {before.folder} is of no use; start a new run "
            f"(adapter_name_or_path={str(before.folder)!r} goes on from its weights)"
        )
    if changes:
        log.info(f"going on with other options than before: {', '.join(changes.values())}")


def without_a_step(run: Path) -> bool:
    """Whether a run broke off before it had done anything: no step, no lessons of a critic, and no files of others."""
    ours = (run / "config.yaml").is_file() and not {path.name for path in run.iterdir()} - UNBEGUN - BEGINNING
    saved = any((run / CHECKPOINTS).glob("step_*"))
    return ours and not saved and not any(row["step"] for row in read_lines(run / "metrics.jsonl"))


def hold(run: Path) -> bool:
    """Whether no other process has the run; from now on this one has, as long as it lives."""
    release(run)
    folder = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        return False
    except OSError:
        pass  # a file system without locks
    _held[run.resolve()] = folder
    return True


def release(run: Path) -> None:
    """Lets other processes have the run."""
    if (key := run.resolve()) in _held:
        os.close(_held.pop(key))


@contextmanager
def released(run: Path) -> Iterator[None]:
    """Lets them have it in the end."""
    try:
        yield
    finally:
        release(run)


def clear(run: Path, allowed: bool, config: TrainConfig) -> None:
    """Empties an earlier run's directory if that was asked for, and nothing but a run's, or what this run needs."""
    if not allowed:
        raise UsageError(
            f"output_dir={str(run)!r} is not empty: --resume {run} goes on with it, --overwrite_output_dir replaces it"
        )
    if not (run / "config.yaml").is_file():
        raise UsageError(
            f"output_dir={str(run)!r} holds files that are no run of ours, so it is not deleted; choose another"
        )
    for name, file in files_named(config):
        if name not in OWN and file.resolve().is_relative_to(run.resolve()):
            raise UsageError(
                f"output_dir={str(run)!r} holds this run's {name} ({file}), so it is not emptied; choose another"
            )
    for path in run.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "config.yaml":  # this last, for it alone shows that this is a run
            path.unlink()
    shutil.rmtree(run)


def files_named(config: TrainConfig) -> Iterator[tuple[str, Path]]:
    """The files and folders that options name, each with its option: `model:FOLDER` and `FILE.py:NAME` among them."""
    for name, value in config.to_dict().items():
        for words in value if isinstance(value, list) else [value]:
            for word in words.split(",") if isinstance(words, str) else []:
                path = re.sub(r"^model:|(?<=\.py):\w+$", "", word.strip())
                with suppress(OSError):  # a text too long for a name
                    if path and Path(path).exists():
                        yield name, Path(path)


def training_seconds(rows: Iterable[dict[str, Any]]) -> float:
    """The seconds that training took: steps, and a critic's first lessons; evaluations and starting up do not count."""
    return sum(row.get("time/step", 0.0) + (row.get("value_init/seconds") or 0.0) for row in rows)


def forget_after(folder: Path, step: int) -> None:
    """Deletes the files of steps that a resumed run takes again, drafts of them too."""
    for path in folder.glob("*step_*"):
        if int(re.findall(r"step_(\d+)", path.name)[0]) > step:
            path.unlink()


def read_metrics(run: Path, step: int) -> list[dict[str, Any]]:
    """The metrics that the run logged up to `step`; none for a new one."""
    return [row for row in read_lines(run / "metrics.jsonl") if step and row["step"] <= step]
