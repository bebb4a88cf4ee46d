"""The attempts of a hostile program, by every method that works on this machine."""

# ruff: noqa: S108  these tests write to /tmp, or see to it that nobody does

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanorlhf.errors import UsageError
from nanorlhf.sandbox import run
from nanorlhf.sandbox.run import METHODS, UNCONTAINED, Limits, Outcome
from tests.waiting import eventually

SECRET = "only the trainer knows"
LANDLOCK = ctypes.CDLL(None).syscall(444, None, 0, 1)  # the kernel's version of it, -1 without


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Each method in turn; one that does not work here is skipped, with the reason."""
    why = run.refusal(request.param)
    if why:
        pytest.skip(f"{request.param}: {why}")
    return request.param


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The machine's folder for temporary files, during a test: open to all, as /tmp is, but not shared with others."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own is closed to other users
    folder.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of the trainer's user, with a secret in its environment."""
    with subprocess.Popen(["sleep", "60"], env={"SECRET": SECRET}) as process:
        yield process
        process.kill()


def attempt(program: str, method: str, **limits: float) -> Outcome:
    return run.run(program, limits=Limits(**limits), method=method)  # type: ignore[arg-type]


def processes(mark: Path) -> list[str]:
    """Processes of sandboxes that were told to keep their temporary files under `mark`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(mark) in (process / "cmdline").read_text():
                found.append(process.name)
        except OSError:
            continue  # it ended
    return found


def test_a_program_reads_writes_and_ends(method: str) -> None:
    program = "import sys; print(input().upper()); print('well', file=sys.stderr); sys.exit(int(input()))"
    outcome = run.run(program, "hé\n3\n", method=method)
    assert outcome == Outcome(status=3, timed_out=False, cut=False, stdout="HÉ\n", stderr="well\n")


def test_a_program_that_raises_says_why(method: str) -> None:
    outcome = attempt("1 / 0", method)
    assert outcome.status == 1 and outcome.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "SyntaxError" in attempt("def", method).stderr


def test_it_has_python_a_folder_and_its_own_main(method: str) -> None:
    program = """
import multiprocessing, pathlib, pickle, random, tempfile
class Thing: pass
print(type(pickle.loads(pickle.dumps(Thing()))).__name__, __name__)
pathlib.Path("note").write_text("kept"); print(open("note").read(), tempfile.mkdtemp() != "")
"""
    assert attempt(program, method).stdout == "Thing __main__\nkept True\n"


def test_it_has_the_packages_of_this_environment(method: str) -> None:
    if run.interpreter(method) != run.interpreter("unshare"):
        pytest.skip("this Python lies where no other user may enter")
    assert attempt("import numpy; print(numpy.arange(3).sum())", method).stdout == "3\n"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os, time\nif os.fork(): time.sleep(60)\nos.setsid()\nwhile True: pass",
        "import signal\nfor n in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import os; os.kill(os.getpid(), 19)",
        "9 ** 9 ** 9 ** 9",
    ],
)
def test_time_is_limited(method: str, program: str) -> None:
    began = time.monotonic()
    assert attempt(program, method, seconds=0.3).timed_out
    assert 0.3 <= time.monotonic() - began < 30


@pytest.mark.parametrize("ask", ["bytearray(10 << 30)", "__import__('mmap').mmap(-1, 10 << 30)", "[0] * (10 << 27)"])
def test_memory_is_limited(method: str, ask: str) -> None:
    outcome = attempt(f"x = {ask}; print('has it')", method)
    assert outcome.stdout == "" and ("MemoryError" in outcome.stderr or "Cannot allocate" in outcome.stderr)


def test_a_fork_bomb_is_small(method: str) -> None:
    bomb = """
import os, time
started = 0
for _ in range(200):  # not more, should nothing hold it
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
    except OSError:
        break
print(started)
"""
    assert 10 < int(attempt(bomb, method, processes=20).stdout) <= 20


def test_output_is_cut(method: str) -> None:
    program = "import sys\nfor _ in range(500): sys.stdout.write('x' * 100_000)\nsys.stderr.write('end')"
    outcome = attempt(program, method, output_kb=10)
    assert outcome == Outcome(status=0, timed_out=False, cut=True, stdout="x" * 10240, stderr="end")
    assert not attempt("print('x' * 10239)", method, output_kb=10).cut


def test_files_are_limited_in_size_and_number(method: str) -> None:
    large = "f = open('f', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))\nprint('written')"
    outcome = attempt(large, method, disk_mb=4)
    assert outcome.stdout == "" and "File too large" in outcome.stderr
    many = "kept = [open('/dev/null') for _ in range(2000)]"
    assert "Too many open files" in attempt(many, method).stderr


def test_files_are_limited_together(method: str) -> None:
    if method == "uid":
        pytest.skip("the uid method has the machine's own disk")
    outcome = attempt("for n in range(64): open(str(n), 'wb').write(bytes(1 << 20))", method, disk_mb=4)
    assert "No space left" in outcome.stderr


def test_nothing_outside_its_folder_is_read_or_written(method: str, scratch: Path) -> None:
    if method == "uid" and LANDLOCK < 1:
        pytest.skip("without Landlock the uid method leaves open what is open to all")
    mine = scratch / "mine"
    mine.write_text(SECRET)
    mine.chmod(0o666)
    repository = Path(__file__).parents[2]
    folders = [scratch, repository, Path.home(), Path.cwd(), *map(Path, ("/", "/usr", "/tmp", "/var/tmp", "/dev/shm"))]
    folders += map(Path, run.view()[0])
    program = f"""
import os, shutil
for folder in {[str(folder) for folder in folders]}:
    try: open(folder + "/planted-by-a-test", "w").close()
    except OSError: pass
mine = {str(mine)!r}
acts = [lambda: print(open(mine).read()), lambda: open(mine, "w"), lambda: os.remove(mine)]
for act in [*acts, lambda: os.listdir(mine[:-5]), lambda: os.symlink("/", "root") or open("root" + mine, "w")]:
    try: act()
    except OSError: print("no")
"""
    assert attempt(program, method).stdout == "no\n" * 5
    assert mine.read_text() == SECRET
    planted = [folder / "planted-by-a-test" for folder in folders if (folder / "planted-by-a-test").exists()]
    for file in planted:
        file.unlink(missing_ok=True)
    assert not planted


def test_nothing_can_be_mounted_anew(method: str) -> None:
    shown = next(path for path in run.view()[0] if Path(path).is_dir())
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for _ in range(2):
    print(libc.mount(None, b"{shown}", None, 32 | 4096, None), libc.umount2(b"{shown}", 2))
    libc.unshare(0x10000000 | 0x20000)  # a user's and a mount namespace, where all capabilities are its own
"""
    assert attempt(program, method).stdout == "-1 -1\n" * 2


def test_the_trainers_environment_is_not_seen(
    method: str, monkeypatch: pytest.MonkeyPatch, bystander: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("SECRET", SECRET)
    program = """
import glob, os
print(os.environ)
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/mem") + ["/proc/1/maps", f"/proc/{os.getppid()}/maps"]:
    try: print(path, open(path).read())
    except (OSError, ValueError): pass
"""
    outcome = attempt(program, method)
    assert "HOME" in outcome.stdout and SECRET not in outcome.stdout
    assert f"/{bystander.pid}/" not in outcome.stdout and "maps" not in outcome.stdout


def test_nobody_else_is_killed(method: str, bystander: subprocess.Popen[bytes]) -> None:
    program = f"""
import os
for pid in ({bystander.pid}, {os.getpid()}, os.getppid(), 1, -1, -{os.getpgid(0)}):
    try: os.kill(pid, 9)
    except OSError: pass
print("done")
"""
    assert attempt(program, method).stdout == "done\n"
    assert bystander.poll() is None


def test_there_is_no_network(method: str) -> None:
    if method == "uid" and LANDLOCK < 6:
        pytest.skip("without a Landlock that knows sockets the uid method leaves the network open")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0nanorlhf-test-{os.getpid()}")
        local.listen()
        program = f"""
import socket
for family, address in ((socket.AF_INET, {tcp.getsockname()}), (socket.AF_UNIX, {local.getsockname()})):
    try: socket.socket(family).connect(address); print("connected")
    except OSError: print("no")
"""
        assert attempt(program, method).stdout == "no\nno\n"


def test_no_file_is_inherited(method: str, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        program = """
import os
for number in range(3, 64):
    try: print(number, os.fstat(number))
    except OSError: pass
"""
        assert attempt(program, method).stdout == ""


DAEMON = """
import os, time
os.mkdir("shut"); open("shut/file", "w").close(); os.chmod("shut", 0)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
time.sleep(0.1)
"""


def test_nothing_is_left_when_it_ends(method: str, scratch: Path) -> None:
    began = time.monotonic()
    assert attempt(DAEMON, method).status == 0
    assert time.monotonic() - began < 30
    assert processes(scratch) == [] and list(scratch.iterdir()) == []


def test_nothing_is_left_when_the_caller_is_killed(method: str, scratch: Path) -> None:
    program, limits = f"{DAEMON}time.sleep(600)".replace("(60)", "(600)"), Limits(seconds=600)
    call = f"from nanorlhf.sandbox.run import *; print(run({program!r}, limits={limits!r}, method={method!r}))"
    env = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen([sys.executable, "-c", call], env=env, stdout=subprocess.PIPE) as caller:
        all_there = eventually(lambda: len(processes(scratch)) >= 3)  # who watches, the program, its daemon
        caller.kill()
        said = caller.communicate()[0]
    assert all_there, f"the caller said {said!r}"
    assert eventually(lambda: not processes(scratch) and not list(scratch.iterdir()))


def test_many_run_at_once(method: str) -> None:
    program = "import os, time\nfor _ in range(12):\n    if os.fork() == 0: time.sleep(9)\nprint({})"
    with ThreadPoolExecutor(6) as pool:
        outcomes = pool.map(lambda n: attempt(program.format(n), method, processes=20), range(12))
        assert [outcome.stdout for outcome in outcomes] == [f"{n}\n" for n in range(12)]


def test_limits_hold_without_containment(scratch: Path) -> None:
    assert attempt("while True: pass", UNCONTAINED, seconds=0.3).timed_out
    assert "MemoryError" in attempt("bytearray(10 << 30)", UNCONTAINED).stderr
    assert attempt("open('file', 'w'); print(__name__)", UNCONTAINED).stdout == "__main__\n"
    assert processes(scratch) == [] and list(scratch.iterdir()) == []


def test_without_containment_nothing_runs_unless_the_user_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "refusal", lambda method: f"no {method}")
    with pytest.raises(UsageError, match=r"bwrap: no bwrap; .*install bubblewrap.*--unsafe_code"):
        run.find_method()
    assert run.find_method(unsafe=True) == UNCONTAINED


def test_the_best_method_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "refusal", {"bwrap": "not installed", "unshare": None, "uid": None}.get)
    assert run.find_method() == run.find_method(unsafe=True) == "unshare"


def test_a_broken_sandbox_is_not_the_programs_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cell.py"
    broken.write_text("raise OSError('no room')")
    monkeypatch.setattr(run, "INSIDE", broken)
    with pytest.raises(run.SandboxError, match="did not start: OSError: no room"):
        run.run("print(1)", method=UNCONTAINED)
