"""Whether a long run stays as it began: what is made of the figures, and a short one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evidence.survival import soak
from evidence.survival.soak import Course, handles, kibibytes, quarters, summary

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")


def course(**changes: list[float]) -> Course:
    """A thousand steps that are all alike, but for those with a checkpoint."""
    alike: dict[str, Any] = {name: [10.0] * 100 for name in ("rss_mib", "heap_mib", "handles", "processes")}
    saving = [3.0 if step % soak.SAVE == 0 else 1.0 for step in range(1, 1001)]
    return Course(10, **{**alike, "seconds": saving, "cpu_seconds": saving, **changes})


def test_quarters_are_of_what_comes_after_the_warm_up() -> None:
    assert quarters([99.0] * 10 + [1.0] * 20 + [2.0] * 25 + [3.0] * 22 + [4.0] * 23) == [1, 2, 3, 4]
    assert quarters([float(i) for i in range(10)]) == [1.5, 3.5, 6, 8.5]


def test_what_is_flat() -> None:
    figures = summary(course())
    assert figures["flat"] and set(figures["last_quarter_over_first"].values()) == {0}
    assert figures["medians_of_quarters"]["cpu_seconds_with_checkpoint"] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("name", "values", "growth"),
    [
        ("rss_mib", [100 + i / 20 for i in range(100)], 0.03),
        ("handles", [10.0 + (i > 80) for i in range(100)], 0.1),
        ("cpu_seconds", [1 + i / 5000 for i in range(1000)], 0.13),
    ],
)
def test_what_grows_is_seen(name: str, values: list[float], growth: float) -> None:
    figures = summary(course(**{name: values}))
    assert not figures["flat"]
    assert figures["last_quarter_over_first"][name] == pytest.approx(growth, rel=0.15)
    assert summary(course(**{name: values[::-1]}))["flat"], "what shrinks does no harm"


def test_memory_and_handles_are_those_of_a_process() -> None:
    held = (
        "import sys; kept = bytearray(b'x' * 2**26); files = [open('/dev/null') for _ in range(20)]; print(); input()"
    )
    before = Course(1)  # of this process, and of children that other tests may have left
    before.look()
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdin and child.stdout.readline()
        rss, heap = kibibytes(child.pid)
        assert 2**16 < heap <= rss < 2**16 + 2**15
        assert 20 <= handles(child.pid) <= 30
        seen = Course(1)
        seen.look()
        assert seen.processes == [before.processes[0] + 1]
        pipes = 2
        assert seen.handles[0] == before.handles[0] + handles(child.pid) + pipes
        child.stdin.close()
    assert kibibytes(child.pid) == (0, 0) and handles(child.pid) == 0


@pytest.mark.slow
@pytest.mark.evidence
def test_a_short_run(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    words = ["--engine", "hf", "--steps", "60", "--output", str(output)]
    subprocess.run([sys.executable, "-m", "evidence.survival.soak", *words], check=False)
    figures = json.loads(output.read_text())["hf"]
    growth = figures["last_quarter_over_first"]
    assert growth["processes"] == 0 and abs(growth["handles"]) < 0.2, "the first checkpoint opens some, once"
    assert abs(growth["rss_mib"]) < 0.1 and growth["cpu_seconds"] < 1
    assert figures["medians_of_quarters"]["processes"] == [2, 2, 2, 2], "the trainer and the worker"
