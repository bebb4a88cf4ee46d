"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanorlhf.errors import RunError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """A file that is there with this text or as it was, whatever happens; `errors`: of what UTF-8 cannot hold."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8", errors=errors)
    sync(draft)
    draft.replace(path)
    sync(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that is there with all that is written into what this gives, or as it was."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in draft.rglob("*"):
            sync(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)  # it may be what has filled the disk
        raise
    discard(folder)
    draft.replace(folder)
    sync(folder.parent)


def discard(folder: Path) -> None:
    """Deletes a folder that must not be found half deleted."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)  # of a process that was killed here
        folder.replace(gone)
        shutil.rmtree(gone)


def sync(path: Path) -> None:
    """Makes sure that a file, or a folder's list of files, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def room(run: Path) -> Iterator[None]:
    """Ends a run in one line if its disk is full."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise RunError(f"no space left on the disk of {run}; make room, and go on with --resume {run}") from error


def is_full(error: Exception) -> bool:
    """Whether this is about a full disk; libraries written in Rust have the number of an error in their words only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number in FULL
