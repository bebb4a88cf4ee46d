"""A run that is killed again and again ends like one that is not; and what would be wrong is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evidence.survival.compare_runs import damage, differences, largest_gap
from nanorlhf.records import checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")


@pytest.mark.evidence
@pytest.mark.slow
def test_three_kills(tmp_path: Path) -> None:
    output = tmp_path / "kills.json"
    output.write_text('{"vllm": {}}')
    words = ["--engine", "hf", "--kills", "3", "--seed", "4", "--output", str(output)]
    alone([sys.executable, "-m", "evidence.survival.kills", *words])
    figures = json.loads(output.read_text())
    assert figures["vllm"] == {}
    found = figures["hf"]
    assert found["kills"] == sum(found["moments"].values()) == 3
    assert found["steps"] == 18 and found["adapter_bit_identical"]
    assert found["differences"] == found["damaged_files"] == found["left_behind"] == []


def made_up(run: Path, loss: float = 0.5, weight: float = 1.0) -> Path:
    """A run of two steps."""

    def write(folder: Path) -> None:
        save_file({"w": torch.tensor([weight])}, folder / "adapter_model.safetensors")

    checkpoint.save(run, 2, write, {}, 1)
    rows = [{"step": 1, "loss": 0.25, "time/step": 1.0}, {"step": 2, "loss": loss, "time/step": loss}]
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_what_is_not_whole_is_seen(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run")
    assert damage(run, ended=True) == []
    (run / "checkpoints" / ".step_000003.draft").mkdir()
    (run / "learning_curve.png").write_bytes(b"\x89PNG...")
    (run / "step_000001.parquet").write_bytes(b"PAR1")
    (run / "config.yaml").write_text("a: [")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    weights = run / "checkpoints" / "step_000002" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    whole = ["config.yaml", "learning_curve.png", "step_000001.parquet", f"{weights.relative_to(run)}", "step_000002"]
    found = [line.split(":")[0] for line in damage(run, ended=False)]
    assert sorted(found) == sorted(whole)
    found = [line.split(":")[0] for line in damage(run, ended=True)]
    assert sorted(found) == sorted([*whole, "metrics.jsonl", "checkpoints/.step_000003.draft is a leftover"])


def test_what_differs_is_seen(tmp_path: Path) -> None:
    one = made_up(tmp_path / "one")
    assert differences(one, made_up(tmp_path / "same")) == []
    other = made_up(tmp_path / "other", 0.5 + 1e-7, 1 + 1e-6)
    lines = [f"{name}: line 2: other loss" for name in ("metrics.jsonl", "samples.jsonl")]
    assert differences(one, other) == [*lines, "w of the adapter"]
    assert differences(one, other, 1e-6) == []
    assert largest_gap(one, other, "loss") == pytest.approx(1e-7)
    (other / "metrics.jsonl").write_text((other / "metrics.jsonl").read_text() * 2)
    (other / "more").touch()
    assert differences(one, other, 1e-6) == ["only one has more", "metrics.jsonl has other steps"]


STAYS = """
import os, subprocess, sys
from evidence.survival import kills

orphan = "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], stdout=-3, stderr=-3).pid)"
kills.PATIENCE, left = 0.2, []
with kills.adopting():
    said = subprocess.run([sys.executable, "-c", orphan], capture_output=True, text=True, check=True).stdout
    assert kills.gone(left) > 0.2
assert left == [f"process {said.strip()}: sleep 600 "], left
assert list(kills.descendants(os.getpid())) == []
"""


def test_a_process_that_stays_is_seen_and_ended() -> None:
    alone([sys.executable, "-c", STAYS])


def alone(command: list[str]) -> None:
    """Runs a command in a process that has no children of other tests."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
