"""Speaks for the whole run: of the processes that a launcher started, only the first prints."""

from __future__ import annotations

import os

from nanorlhf.errors import plain

LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}  # what a launcher says to each process


def launched() -> bool:
    """Whether there are other processes of this run."""
    return os.environ.keys() >= LAUNCHED and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process speaks for all."""
    return not launched() or os.environ["RANK"] == "0"


def tell(line: str) -> None:
    """A line of the run's, said once however many processes it has."""
    if speaks():
        print(plain(line), flush=True)


def signature() -> str:
    """Which process it is, if there are several."""
    return f" (process {os.environ['RANK']})" if launched() else ""
