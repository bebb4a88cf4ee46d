"""The order of test files, which of them take long, and a log that is printed although pytest listens to it."""

from __future__ import annotations

import atexit
import gc
from collections import Counter
from typing import Any

import hypothesis  # noqa: F401  before anything is left out of collections: it asks who refers to its random numbers
import pytest

from nanorlhf.system.terminal import Terminal, log

SHOWN = 8  # files
log.addHandler(Terminal())
atexit.register(gc.unfreeze)


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """Leaves libraries, and what other files left, out of collections, which would take a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: of two processes neither waits for the other's long last file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Keeps the slowest files in sight."""
    seconds = Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.location[0]] += report.duration
    slowest = [f"{file} {spent:.0f} s" for file, spent in seconds.most_common(SHOWN) if spent >= 1]
    if slowest:
        terminalreporter.write_line(f"slowest files: {', '.join(slowest)}")
