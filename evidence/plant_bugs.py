"""Plants known bugs, one at a time, in a copy of the repository: the tests that are named with each must find it.

    python -m evidence.plant_bugs
    python -m evidence.plant_bugs --only whitening "prefix cache"
    python -m evidence.plant_bugs --list

evidence/planted_bugs.yaml holds them. All of these tests run once without a bug, and must pass. If no bug is left out,
results/planted_bugs.json is written. Needs git, a system that forks, and vLLM for the bugs of its engine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from evidence.results import RESULTS, ROOT, where, write

BUGS, RESULT = ROOT / "evidence" / "planted_bugs.yaml", RESULTS / "planted_bugs.json"
FAILED = 1  # pytest's status if a test failed; if a file cannot be imported, or no test is found, it is another
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
# Libraries of others are loaded once; ours are not, so that each fork imports them with the bug in them.
RUNNER = """
import atexit, contextlib, gc, importlib, json, os, signal, sys
import pytest
for name in ("torch", "transformers", "peft", "datasets", "accelerate", "scipy.stats", "jsonargparse", "hypothesis"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.freeze()
atexit.register(gc.unfreeze)
for line in sys.stdin:
    if not (child := os.fork()):
        signal.alarm(900)  # a bug may make a test wait forever
        log = os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
        for stream, to in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(to, stream)
        sys.exit(pytest.main(json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ORIGINS = "import importlib.util, sys; print(*(importlib.util.find_spec(n).origin for n in sys.argv[1:]), sep='\\n')"


@dataclass(frozen=True, slots=True)
class Bug:
    """A mistake that somebody could make: a text that stands once in a file, and another in its place."""

    name: str  # what is wrong, in a sentence
    file: str
    old: str
    new: str
    tests: list[str]  # files or node ids, of which one must fail

    def misfits(self) -> list[str]:
        """Complaints, if the repository has changed so that it cannot be planted or nobody looks for it."""
        times = read(self.file).count(self.old)
        wrong = [] if times == 1 else [f"{self.file} holds its text {times} times"]
        for test in self.tests:
            file, _, name = test.partition("::")
            wrong += [] if f"def {name.partition('[')[0]}" in read(file) else [f"there is no {test}"]
        return wrong


def read(file: str) -> str:
    """The text of a file of the repository; empty if there is none."""
    return (ROOT / file).read_text() if (ROOT / file).is_file() else ""


class Copy:
    """A copy of the repository, changes that are not committed included, and a process that runs tests in it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log = folder / "copy", folder / "log.txt"
        self.copy_files()
        self.log.touch()
        environment = os.environ | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        # Whether a compiled file is stale is judged by seconds and sizes, and a bug may change neither.
        environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
        self.check_imports(self.link_packages(), environment)
        line, pipe = [sys.executable, "-c", RUNNER, str(self.log)], subprocess.PIPE
        self.runner = subprocess.Popen(line, cwd=self.root, env=environment, stdin=pipe, stdout=pipe, text=True)

    def copy_files(self) -> None:
        """Copies every file that git does not ignore."""
        words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file() or (ROOT / name).is_symlink():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name, follow_symlinks=False)

    def link_packages(self) -> list[str]:
        """Links packages that lie in other folders, as pyproject.toml has it, to where imports look; names all."""
        folders = tomllib.loads((self.root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
        for name, folder in folders.items():
            if not (place := self.root / name.replace(".", "/")).exists():
                place.symlink_to(self.root / folder)
        return list(folders)

    def check_imports(self, packages: list[str], environment: dict[str, str]) -> None:
        """Makes sure that packages come from the copy, in whichever folder a process begins."""
        line = [sys.executable, "-c", ORIGINS, *packages]
        said = subprocess.run(line, cwd="/", env=environment, capture_output=True, text=True, check=True).stdout
        assert all(Path(path).is_relative_to(self.root) for path in said.splitlines()), f"not of the copy: {said}"

    def test(self, tests: Sequence[str]) -> int:
        """Runs tests; gives pytest's status, or minus the signal that ended it."""
        assert self.runner.stdin and self.runner.stdout
        print(json.dumps([*PYTEST, *tests]), file=self.runner.stdin, flush=True)
        return int(self.runner.stdout.readline())

    def find(self, bug: Bug) -> dict[str, str | bool | float]:
        """Runs a bug's tests with the bug in its place; says whether they found it, and in how many seconds."""
        path, start = self.root / bug.file, time.perf_counter()
        text = path.read_text()
        path.write_text(text.replace(bug.old, bug.new))
        status = self.test(bug.tests)
        path.write_text(text)
        found, seconds = status == FAILED, round(time.perf_counter() - start, 1)
        why = "" if status in (0, FAILED) else f" (pytest ended with {status})"
        print(f"{'found' if found else 'NOT FOUND':<9} {seconds:>6.1f} s  {bug.name}{why}", flush=True)
        return {"name": bug.name, "found": found, "seconds": seconds}


def read_bugs() -> list[Bug]:
    """All bugs that are known."""
    return [Bug(**entry) for entry in yaml.safe_load(BUGS.read_text())]


def main(argv: list[str] | None = None) -> int:
    """Gives 1 if a bug is not found or no longer fits, or if a test fails without one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="bugs whose name holds one of these texts")
    parser.add_argument("--list", action="store_true", help="name them, and plant none")
    args = parser.parse_args(argv)
    everything = read_bugs()
    bugs = [bug for bug in everything if any(text.lower() in bug.name.lower() for text in args.only or [""])]
    if not bugs:
        parser.error(f"no bug's name holds {' or '.join(map(repr, args.only))}; --list shows them all")
    if args.list:
        print(*(f"{bug.name}\n  {bug.file}: {' '.join(bug.tests)}" for bug in bugs), sep="\n")
        return 0
    if wrong := [f"{bug.name} {complaint}" for bug in bugs for complaint in bug.misfits()]:
        print("no longer fit:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, (copy := Copy(Path(folder).resolve())).runner:
        if copy.test(list(dict.fromkeys(test for bug in bugs for test in bug.tests))):
            print(f"without a bug these tests must pass:\n{copy.log.read_text()}", file=sys.stderr)
            return 1
        rows = [copy.find(bug) for bug in bugs]
    if len(bugs) == len(everything):
        write(RESULT, {"bugs": rows} | where())
    found = sum(bool(row["found"]) for row in rows)
    print(f"{found} of {len(bugs)} were found")
    return int(found < len(bugs))


if __name__ == "__main__":
    sys.exit(main())
