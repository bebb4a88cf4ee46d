"""The lines that a run wrote, once it goes on from an earlier step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanorlhf.records.tracking import cut_after


def line(step: int, text: str = "") -> bytes:
    return (json.dumps({"step": step, "completion": text}, ensure_ascii=False) + "\n").encode()


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        line(3),
        line(2, "ü")[:-4],  # killed in the middle of a letter
        line(3, "half a line \u2028")[:-9],
        line(3, "whole \u2028, though text would end a line there") + line(3) + line(4),
    ],
)
def test_steps_to_come_and_half_a_line_are_cut_off(rest: bytes, tmp_path: Path) -> None:
    path, kept = tmp_path / "samples.jsonl", line(1) + line(2, "a\u2028b\x85c") + line(2, "ü")
    path.write_bytes(kept + rest)
    cut_after(path, 2)
    assert path.read_bytes() == kept


def test_without_a_checkpoint_nothing_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(0) + line(1))
    cut_after(path, -1)
    assert path.read_bytes() == b""
    cut_after(tmp_path / "nowhere", 1)
    assert not (tmp_path / "nowhere").exists()
