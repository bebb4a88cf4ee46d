"""Rewards at work in processes of their own: one that hangs, dies or eats memory is killed, and costs one completion.

Plain subprocesses, because those of multiprocessing run the user's script again in every child, share Ctrl-C with the
trainer, and leave their own children behind when they are killed. Functions travel by cloudpickle; what comes back is
JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from nanorlhf.errors import RewardError, error_line
from nanorlhf.scoring.reward import Reward, Verdict, judge

START_LIMIT = 300.0  # seconds in which a worker must have imported what its functions need
LARGEST = 100 * 2**20  # bytes of pickled functions; more is a model, which does not belong into workers
PR_SET_PDEATHSIG = 1
SECRET = re.compile(r"SECRET|PASSW|CREDENTIAL|(TOKEN|KEY|PASS)S?(_|$)", re.IGNORECASE)


class Pool:
    """So many workers, each with all the rewards; a call waits for a free one."""

    def __init__(
        self, rewards: Sequence[Reward], workers: int, memory: int, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.threads = ThreadPoolExecutor(workers, "reward")
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        packed = cloudpickle.dumps((memory, {reward.name: reward for reward in rewards}))
        self.workers = [Worker(packed, environment) for _ in range(workers)]
        for worker in self.workers:
            worker.start()
            self.idle.put(worker)
        self.end = weakref.finalize(self, end, self.threads, self.workers)

    def submit(self, name: str, arguments: Mapping[str, Any], count: int, limit: float) -> Future[Verdict]:
        """A call of one reward, for `count` completions, that may take `limit` seconds."""
        return self.threads.submit(self.call, name, arguments, count, limit)

    def call(self, name: str, arguments: Mapping[str, Any], count: int, limit: float) -> Verdict:
        worker = self.idle.get()
        try:
            return worker.ask(name, arguments, count, limit)
        finally:
            self.idle.put(worker)


def end(threads: ThreadPoolExecutor, workers: Sequence[Worker]) -> None:
    """No call is begun any more, and every process is gone."""
    threads.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.retire()
    threads.shutdown()
    for worker in workers:
        worker.strike()


def without_secrets(environment: Mapping[str, str], allowed: Collection[str] = ()) -> dict[str, str]:
    """The variables whose names do not say that they hold a secret, and those that are allowed all the same."""
    return {name: value for name, value in environment.items() if name in allowed or not SECRET.search(name)}


def packable(reward: Reward) -> str | None:
    """Why a reward cannot travel to a worker; None if it can."""
    try:
        size = len(cloudpickle.dumps(reward))
    except Exception as error:  # noqa: BLE001  whatever a user's object may raise
        return error_line(error)
    return f"it holds {size / 2**20:,.0f} MiB" if size > LARGEST else None


class Worker:
    """One process, which is started again after it had to be killed."""

    def __init__(self, packed: bytes, environment: Mapping[str, str]) -> None:
        self.packed, self.retired, self.ready = packed, False, False
        self.environment = {**environment, "OMP_NUM_THREADS": "1"}
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None

    def start(self) -> None:
        """Starts the process; its imports go on while nothing waits for them."""
        here, there = socket.socketpair()
        with there:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from nanorlhf.scoring.workers import serve; serve({there.fileno()})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,  # Ctrl-C is the trainer's, and the whole group can be killed
                env=self.environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self.connection, self.ready = Connection(here.detach()), False

    def ask(self, name: str, arguments: Mapping[str, Any], count: int, limit: float) -> Verdict:
        """The reward's verdict on these completions, or what became of the process that was asked."""
        began = time.perf_counter()
        try:
            connection = self.prepared()
            began = time.perf_counter()
            connection.send_bytes(pickle.dumps((name, dict(arguments), count)))
            if not connection.poll(limit):
                self.kill()
                return Verdict.of_fault(f"took more than {limit:g} s", count, limit)
            return Verdict(**json.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            return Verdict.of_fault(f"ended its process ({self.kill()})", count, time.perf_counter() - began)

    def prepared(self) -> Connection:
        """The connection to a process that has its functions."""
        if self.process is None or self.process.poll() is not None:
            self.kill()
            if self.retired:
                raise EOFError
            self.start()
        assert self.connection is not None
        if not self.ready:
            trouble = "it did not answer"
            try:
                self.connection.send_bytes(self.packed)
                if self.connection.poll(START_LIMIT):
                    trouble = self.connection.recv_bytes().decode()
            except (EOFError, OSError):
                trouble = "its process ended"
            if trouble and not self.retired:
                self.kill()
                raise RewardError(f"a reward worker could not start: {trouble}")
            self.ready = True
        return self.connection

    def kill(self) -> str:
        """Ends the process with everything it started; says how it had ended if it had."""
        how = "killed"
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self.process.wait(0.2)
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            self.strike()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None
        return how

    def strike(self) -> None:
        """SIGKILL for the whole group."""
        if self.process is not None:
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def retire(self) -> None:
        """Never starts again; a call that is under way ends."""
        self.retired = True
        self.strike()


def serve(descriptor: int) -> None:
    """A worker's life: it takes its functions, and then judges what it is sent, until no more is sent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a trainer that is killed leaves no process behind
    connection = Connection(descriptor)
    with suppress(EOFError, OSError):  # the trainer has gone
        try:
            memory, rewards = pickle.loads(connection.recv_bytes())  # noqa: S301  from the trainer itself
        except (EOFError, OSError):
            return
        except Exception as error:  # noqa: BLE001  an import can raise anything
            connection.send_bytes(error_line(error).encode())
            return
        limit_memory(memory)
        connection.send_bytes(b"")
        while True:
            name, arguments, count = pickle.loads(connection.recv_bytes())  # noqa: S301  from the trainer itself
            verdict = judge(rewards[name], arguments, count)
            connection.send_bytes(json.dumps(verdict.to_dict(), default=str).encode())


def limit_memory(size: int) -> None:
    """Larger allocations raise MemoryError, beyond what the imports took."""
    if sys.platform == "linux":
        size = min(size, sys.maxsize)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
