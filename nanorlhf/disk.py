"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """A file that is there with this text or as it was, whatever happens."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def discard(folder: Path) -> None:
    """Deletes a folder that must not be found half deleted."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.gone")
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
