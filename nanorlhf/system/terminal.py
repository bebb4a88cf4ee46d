"""The log of a run, by Python's own logging: the first process speaks for all, and the terminal prints it."""

from __future__ import annotations

import logging
import os

from tqdm import tqdm

from nanorlhf.errors import plain

LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}  # what a launcher says to each process
EACH = {"each": True}  # `extra` of a record about one process alone: each logs its own

log = logging.getLogger("nanorlhf")
log.setLevel(log.level or logging.INFO)


def launched() -> bool:
    """Whether there are other processes of this run."""
    return os.environ.keys() >= LAUNCHED and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process speaks for all."""
    return not launched() or os.environ["RANK"] == "0"


def signature() -> str:
    """Which process it is, if there are several."""
    return f" (process {os.environ['RANK']})" if launched() else ""


class Terminal(logging.Handler):
    """Standard output, above any bar; what others wrote cannot move the cursor."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode():
            print(plain(self.format(record)) + "\n", end="", flush=True)  # in one piece, even if it is not buffered


def heard(record: logging.LogRecord) -> bool:
    """Whether this process logs the record; where logging has not been set up, the terminal prints it."""
    if not log.hasHandlers():
        log.addHandler(Terminal())
        log.propagate = False  # or a handler that comes later would print it again
    if hasattr(record, "each"):
        record.msg += signature()
        return True
    return speaks()


log.addFilter(heard)
