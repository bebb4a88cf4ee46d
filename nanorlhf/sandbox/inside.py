"""Inside the sandbox: shuts itself in, becomes the program in a child, and watches over that child.

Never imported by the trainer: `nanorlhf.sandbox` hands this text to an interpreter of its own, with a last line that
calls `main`. It imports little, for every run waits for it, and runs on Python 3.10 too.
"""

# ruff: noqa: PTH102, PTH103, PTH106, PTH112, PTH120, PTH123, PTH211
# pathlib would cost 5 ms to import
from __future__ import annotations

import builtins
import ctypes
import os
import resource
import select
import sys
import time
import types

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 2**17, 2**27, 2**28, 2**29, 2**30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    32,
    2**12,
    2**13,
    2**14,
    2**18,
)
AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = -100, 0x8000, 442
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
SIGKILL = 9  # the signal module costs 4 ms to import
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
TMP = "/tmp"  # noqa: S108  of the new root, which is the program's alone
STAGE = "/sys"  # a mount point that exists everywhere and holds nothing that is to be shown


def main(order: dict) -> None:
    """Does as ordered; returns only in the program's own process, to the interpreter's end."""
    if order["method"] == "unshare":
        enter(order["uid"] is None)
        build(order)
    libc("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program must not look into this process, whose user may be its own
    libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    home = TMP if order["method"] in ("bwrap", "unshare") else furnish(order["scratch"], order["uid"])
    outputs = [os.pipe(), os.pipe()]
    child = os.fork()
    if child == 0:
        source = become(order, home, [write for _, write in outputs])
        program = types.ModuleType("__main__")
        sys.modules["__main__"] = program
        sys.argv = ["program.py"]
        exec(compile(source, "program.py", "exec"), program.__dict__)  # noqa: S102  what a sandbox is for
        return
    for _, write in outputs:
        os.close(write)
    report = watch(child, [read for read, _ in outputs], order["seconds"], order["output"])
    if home != TMP:  # which goes with its namespace, like every process in it
        clear(child, home, order["uid"])
    with os.fdopen(1, "wb") as caller:
        caller.write(report)
    os._exit(0)  # and with the first process of a namespace all others end


def libc(name: str, *arguments: object) -> int:
    """A call of the C library, whose failure is an OSError."""
    result = getattr(LIBC, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def enter(as_user: bool) -> None:
    """Goes on as the first process of namespaces of its own; root needs none for users, and drops its id later."""
    user, group = os.getuid(), os.getgid()
    libc("unshare", CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | (CLONE_NEWUSER if as_user else 0))
    if as_user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(text)
    first = os.fork()
    if first:
        os._exit(os.waitpid(first, 0)[1] and 1)
    libc("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def build(order: dict) -> None:
    """A root of its own: what is shown, read-only, and an empty /tmp of limited size."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for name in ("/proc", "/dev", TMP):
        os.mkdir(STAGE + name)
    mount("proc", f"{STAGE}/proc", "proc", MS_NOSUID | MS_NODEV)
    mount("tmpfs", STAGE + TMP, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={order['disk']},nr_inodes=4096")
    for path in [*order["show"], *DEVICES]:
        show(path)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        os.symlink(f"/proc/self/fd/{number}", f"{STAGE}/dev/{name}")
    os.symlink("/proc/self/fd", f"{STAGE}/dev/fd")
    os.symlink(TMP, STAGE + "/dev/shm")  # noqa: S108  multiprocessing looks here
    for path, target in order["links"].items():
        os.symlink(target, STAGE + path)
    mount(None, STAGE, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(STAGE)
    mount(".", "/", None, MS_MOVE)
    os.chroot(".")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2) with text."""
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    libc("mount", *texts[:3], flags, texts[3])


def show(path: str) -> None:
    """A file or folder of the machine at the same place in the new root, read-only with all that is mounted in it."""
    target = STAGE + path
    os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
    if not os.path.isdir(path):
        with open(target, "w", encoding="utf-8"):
            pass
    mount(path, target, None, MS_BIND | MS_REC)
    if path not in DEVICES:
        attributes = (MS_RDONLY | MS_NOSUID | MS_NODEV).to_bytes(8, sys.byteorder) + bytes(24)
        libc("syscall", MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, len(attributes))


def furnish(scratch: str, uid: int | None) -> str:
    """A temporary folder, the program's own."""
    home = f"{scratch}/nanorlhf-{os.urandom(8).hex()}"
    os.mkdir(home, 0o700)
    if uid is not None:
        os.chown(home, uid, uid)
    return home


def become(order: dict, home: str, outputs: list[int]) -> bytes:
    """Gives up every right and every inherited file; the program's text, read before its file is closed."""
    with os.fdopen(order["program"], "rb") as file:
        source = file.read()
    for number, descriptor in enumerate([order["input"], *outputs]):
        os.dup2(descriptor, number)
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208  pathlib is much to import for this
        os.closerange(max(descriptor, 3), descriptor + 1)
    os.setsid()
    uid = order["uid"]
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # after the ids, whose change clears it
    libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc("capset", (0x20080522).to_bytes(4, sys.byteorder) + bytes(4), bytes(24))  # version 3, this process, nothing
    libc("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # or its own /proc/self would be closed to it
    with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
        file.write("1000")  # if memory is short, this process goes first
    for name, value in order["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)  # noqa: PLW2901
        resource.setrlimit(kind, (value, value))
    os.chdir(home)
    os.environ.update(HOME=home, TMPDIR=home)
    if order["method"] == "uid":
        fence(home, [*order["show"], *order["links"], "/proc/self"])
    builtins.exit = builtins.quit = sys.exit  # which the site module would bring, slowly
    sys.path += [path for path in order["packages"] if order["version"] == list(sys.version_info[:2])]
    return source


def fence(home: str, shown: list[str]) -> None:
    """Landlock, as far as the kernel has it: no other files, then no TCP, then no signals to processes outside."""
    version = LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    everything = 2 ** (13, 14, 15, 15, 16)[min(version, 5) - 1] - 1
    read_file, read_folder, device = 0b101, 0b1101, 0b110  # bits: execute, write a file, read one, list a folder
    handled = b"".join(part.to_bytes(8, sys.byteorder) for part in (everything, 0b11, 0b11))
    handled = handled[: 8 + 8 * (version >= 4) + 8 * (version >= 6)]
    rules = libc("syscall", LANDLOCK_CREATE_RULESET, handled, len(handled), 0)
    for path in [home, *shown, *DEVICES]:
        if os.access(path, os.R_OK):
            allowed = everything if path == home else device if path in DEVICES else read_file
            allowed |= read_folder if os.path.isdir(path) else 0
            opened = os.open(path, os.O_PATH)
            beneath = allowed.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
            libc("syscall", LANDLOCK_ADD_RULE, rules, 1, beneath, 0)
            os.close(opened)
    libc("syscall", LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def watch(child: int, outputs: list[int], seconds: float, largest: int) -> bytes:
    """A line of numbers and what the program wrote; it is killed when its time is up, or the caller gone."""
    kept = {output: bytearray() for output in outputs}
    poll, end, status, killed = select.poll(), time.monotonic() + seconds, None, False
    for descriptor in [0, *outputs]:
        poll.register(descriptor, select.POLLIN)
    if hasattr(os, "pidfd_open"):
        poll.register(os.pidfd_open(child), select.POLLIN)
    while status is None:
        left = end - time.monotonic()
        patience = min(left, 60 if hasattr(os, "pidfd_open") else 0.01)
        ready = [descriptor for descriptor, _ in poll.poll(max(0, patience * 1000))]
        for output in kept.keys() & ready:
            if not drain(output, kept[output], largest):
                poll.unregister(output)
        killed = 0 in ready or left <= 0
        if killed:
            os.kill(child, SIGKILL)
        status = reap(child, wait=killed)
    for output, text in kept.items():  # its last words; others that hold the pipe are not waited for
        os.set_blocking(output, False)
        while len(text) <= largest and drain(output, text, largest):
            pass
    texts = [text[:largest] for text in kept.values()]
    cut = any(len(text) > largest for text in kept.values())
    return b"%d %d %d %d\n" % (status, killed, cut, len(texts[0])) + b"".join(texts)


def drain(output: int, text: bytearray, largest: int) -> bool:
    """Reads on; keeps one byte more than is allowed, which tells that there was more. False if there is nothing."""
    try:
        data = os.read(output, 2**16)
    except BlockingIOError:
        return False
    text += data[: largest + 1 - len(text)]
    return bool(data)


def reap(child: int, wait: bool) -> int | None:
    """The child's status, if it has ended; orphans that came here are taken too."""
    while True:
        pid, status = os.waitpid(child if wait else -1, 0 if wait else os.WNOHANG)
        if pid in (0, child):
            return status if pid else None


def clear(child: int, home: str, uid: int | None) -> None:
    """Ends whatever the program has left running, and removes its folder."""
    try:
        if uid is None:
            os.killpg(child, SIGKILL)
        else:
            sweep(uid)
        while uid is not None:
            os.wait()
    except (ProcessLookupError, ChildProcessError):
        pass
    try:
        os.rmdir(home)
    except OSError:
        import shutil

        shutil.rmtree(home, ignore_errors=True)


def sweep(uid: int) -> None:
    """Kills all that this user runs at once, so that none can fork away from it."""
    sweeper = os.fork()
    if sweeper:
        os.waitpid(sweeper, 0)
        return
    os.setresuid(uid, uid, uid)
    os.kill(-1, SIGKILL)
    os._exit(0)
