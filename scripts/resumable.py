"""The finished parts of a long measurement, on disk one by one: asked the same again, it goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanorlhf.records.directory import read_lines
from nanorlhf.system.files import write_whole


class Kept:
    """Finished parts; the file's first line says what was asked, and each other one holds a part.

    Without a path nothing outlives the process.
    """

    def __init__(self, path: Path | None, asked: dict[str, Any]) -> None:
        self.path = path
        self.parts: list[Any] = []
        if path is None:
            return
        first, *others = read_lines(path) or [None]
        if first == json.loads(json.dumps(asked)):
            self.parts = others
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(line) + "\n" for line in [asked, *self.parts]))

    def add(self, part: Any) -> None:
        """Takes in one part more."""
        self.parts.append(part)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(part) + "\n")


def stamps(*paths: Path) -> dict[str, list[int]]:
    """Size and time of these files and of those in these folders: if they change, so does the question."""
    files = (file for path in paths for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file())
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
