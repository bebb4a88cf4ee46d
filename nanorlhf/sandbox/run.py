"""Runs an untrusted program in a process of its own that can harm, see and outlive nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import BinaryIO

from nanorlhf.errors import UsageError

UNCONTAINED = "none"
METHODS = {  # the first that works is taken
    "bwrap": "bubblewrap: no network, no other process in sight, no file but libraries, and those to read",
    "unshare": "namespaces, made without bubblewrap: no network, no other process in sight, no file but libraries",
    "uid": "a user id of its own: it keeps UDP, and on kernels before 6.7 all of the network, "
    "before 5.13 every file that is open to all users",
}
WORDS = METHODS | {UNCONTAINED: "nothing but limits of time, memory and files: it may do whatever you may"}
INSIDE = Path(__file__).with_name("inside.py")
SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store"]
SYSTEM += ["/etc/alternatives", "/etc/ld.so.cache"]
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # threads count as processes
PROBE = "import json, sys; assert sys.version_info >= (3, 10), f'its Python is {sys.version}'; print('inside')"
FIRST_UID = 0x7000_0000  # in a range that systemd's list of user ids leaves unused
START = 60.0  # seconds, far more than setting up or clearing away can take, after which the sandbox itself is at fault


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a program; memory is that of one process, and its files are limited one by one and together."""

    seconds: float = 10.0
    memory_mb: int = 1024
    disk_mb: int = 32
    processes: int = 32
    open_files: int = 64
    output_kb: int = 64  # of stdout and of stderr each; the rest is read and thrown away

    def as_resources(self) -> dict[str, int]:
        """By the names that setrlimit has for them."""
        return {
            "RLIMIT_AS": self.memory_mb << 20,
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": ceil(self.seconds) + 1,
            "RLIMIT_FSIZE": self.disk_mb << 20,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": self.processes,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run."""

    status: int  # the exit code, or minus the signal that ended it
    timed_out: bool
    cut: bool  # whether it wrote more than was kept
    stdout: str
    stderr: str


class SandboxError(RuntimeError):
    """The sandbox failed, whatever the program is like."""


def run(program: str, stdin: str | bytes = "", *, limits: Limits = Limits(), method: str) -> Outcome:
    """Runs the text of a Python program by one of METHODS, or UNCONTAINED; when this returns, nothing of it is left."""
    with ExitStack() as stack:
        files = [stack.enter_context(in_memory(text)) for text in (program, stdin)]
        watched, lifeline = os.pipe()  # nothing is ever written: its end, even by SIGKILL, says that we are gone
        stack.callback(os.close, watched)
        closing = stack.enter_context(ExitStack())
        closing.callback(os.close, lifeline)
        process = stack.enter_context(
            subprocess.Popen(
                command(method, limits, *(file.fileno() for file in files)),
                stdin=watched,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[file.fileno() for file in files],
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,  # Ctrl-C is ours
            )
        )
        with closing:
            try:
                reply, complaint = process.communicate(timeout=limits.seconds + START)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise SandboxError(f"the sandbox ({method}) did not end") from error
    head, _, rest = reply.partition(b"\n")
    if not head:
        raise SandboxError(f"the sandbox ({method}) did not start: {last_line(complaint)}")
    status, killed, cut, length = map(int, head.split())
    status = os.waitstatus_to_exitcode(status)
    texts = [text.decode(errors="replace") for text in (rest[:length], rest[length:])]
    return Outcome(status, bool(killed) or status == -signal.SIGXCPU, bool(cut), *texts)


def in_memory(text: str | bytes) -> BinaryIO:
    """A file that holds the text and has no name."""
    file = os.fdopen(os.memfd_create("nanorlhf"), "w+b")
    file.write(text.encode(errors="replace") if isinstance(text, str) else text)
    file.seek(0)
    return file


def command(method: str, limits: Limits, program: int, stdin: int) -> list[str]:
    """The command that starts inside.py with its order, behind bubblewrap if that is the method."""
    show, links = view()
    order = {
        "method": method,
        # A user for each run: kills and process limits go by user. Ids of threads are unique.
        "uid": FIRST_UID + threading.get_native_id() if os.getuid() == 0 and method != UNCONTAINED else None,
        "program": program,
        "input": stdin,
        "seconds": limits.seconds,
        "output": limits.output_kb << 10,
        "disk": limits.disk_mb << 20,
        "limits": limits.as_resources(),
        "show": show,
        "links": links,
        "scratch": tempfile.gettempdir() if is_open(Path(tempfile.gettempdir())) else "/tmp",  # noqa: S108
        "packages": packages(),
        "version": list(sys.version_info[:2]),
    }
    text = f"{INSIDE.read_text()}\nmain({order!r})\n"
    return [*(bubblewrap(limits) if method == "bwrap" else []), interpreter(method), "-I", "-S", "-B", "-c", text]


def bubblewrap(limits: Limits) -> list[str]:
    """bwrap with its options, up to the command that it is to start."""
    show, links = view()
    small = ["--perms", "1777", "--size", str(limits.disk_mb << 20), "--tmpfs"]
    above = {str(folder): None for path in show for folder in reversed(Path(path).parents) if str(folder) != "/"}
    return [
        *("bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--as-pid-1", "--die-with-parent"),
        *("--proc", "/proc", "--dev", "/dev", *small, "/dev/shm", *small, "/tmp"),  # noqa: S108
        *(word for path in above for word in ("--perms", "755", "--dir", path)),  # by itself it would let in root only
        *(word for path in show for word in ("--ro-bind", path, path)),
        *(word for path, target in links.items() for word in ("--symlink", target, path)),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--"),
    ]


@cache
def view() -> tuple[list[str], dict[str, str]]:
    """The part of this machine that a program sees: system libraries, Python and its packages; folders, and links."""
    links = {path: str(Path(path).readlink()) for path in SYSTEM if Path(path).is_symlink()}
    wanted = [path for path in SYSTEM if path not in links and Path(path).exists()]
    shown: list[Path] = []
    for path in sorted(Path(p).resolve() for p in [*wanted, sys.base_prefix, sys.base_exec_prefix, *packages()]):
        if not any(path.is_relative_to(other) for other in shown):
            shown.append(path)
    return [str(path) for path in shown], links


def packages() -> list[str]:
    """The folders of installed packages."""
    return [
        str(Path(p).resolve()) for p in sys.path if p.endswith(("site-packages", "dist-packages")) and Path(p).is_dir()
    ]


def interpreter(method: str) -> str:
    """This Python or, if it lies in a folder that the program's user may not enter, the system's."""
    ours = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    return str(ours) if method != "uid" or is_open(ours) else "/usr/bin/python3"


def is_open(path: Path) -> bool:
    """Whether every user may enter this folder, or start this program, and the folders above it."""
    return all(part.stat().st_mode & 1 for part in [path, *path.parents])


@cache
def refusal(method: str) -> str | None:
    """Why a method does not work here, found by trying; None if it does."""
    if method == "bwrap" and shutil.which("bwrap") is None:
        return "not installed"
    if method == "uid" and os.getuid() != 0:
        return "for root only"
    try:
        outcome = run(PROBE, method=method)
    except (OSError, SandboxError) as error:
        return str(error)
    return None if outcome.stdout == "inside\n" else last_line(outcome.stderr)


def find_method(unsafe: bool = False) -> str:
    """The best method that works here; UNCONTAINED only if there is none and the user has agreed."""
    for method in METHODS:
        if refusal(method) is None:
            return method
    if unsafe and sys.platform == "linux":
        return UNCONTAINED
    tried = "; ".join(f"{method}: {refusal(method)}" for method in METHODS)
    raise UsageError(
        f"there is nothing here to contain a model's code in ({tried}); install bubblewrap, or say --unsafe_code "
        f"where this machine holds nothing that such code may not see, change or send"
    )


def last_line(text: bytes | str) -> str:
    """The last line of a traceback."""
    text = text if isinstance(text, str) else text.decode(errors="replace")
    return (text.strip().splitlines() or ["it says nothing"])[-1]
