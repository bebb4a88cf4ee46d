"""Both runs for a card that is there for minutes, for real on a CPU with tiny shapes; no check ends another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evidence.gpu import bench as gpu_bench
from evidence.gpu import first as gpu_first
from evidence.gpu.bench import Bench, Check, carry_out
from tests.cuda_on_cpu.card import ROOT
from tests.cuda_on_cpu.test_cuda_on_cpu import COMPILER

Lines = list[dict[str, Any]]
ON_CARD = """
import sys
from pathlib import Path
from tests.cuda_on_cpu import card
card.insert(card.build(sys.argv[1], Path(sys.argv[2])))
from tests.cuda_on_cpu.kernels import register
register()
from evidence.gpu.first import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run sets these for good."""
    for name, value in gpu_first.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def carried_out(run: str, folder: Path) -> Lines:
    """A run's lines; every check must hold."""
    held = gpu_first.main(
        [run, "--device", "cpu", "--tiny", "--seconds", "3000", "--commit", "c0", "--output", str(folder)]
    )
    lines = [json.loads(line) for line in (folder / f"gpu_first_{run}.jsonl").read_text().splitlines()]
    assert held == 0, [line for line in lines if not line.get("ok", True)]
    assert lines[0]["commit"] == "c0" and lines[0]["versions"]["torch"] and "only a trial" in lines[0]["card"]
    return lines


def of(lines: Lines, check: str) -> Lines:
    return [line for line in lines if line["check"] == check]


def test_the_run_without_vllm(tmp_path: Path) -> None:
    lines = carried_out("1", tmp_path)
    assert [line["check"] for line in lines if "ok" in line] == [
        "probe", "attention", "residency", "gradients", "adapters", "row", "kernels",
    ]  # fmt: skip
    assert len([line for line in of(lines, "attention") if line.get("relative_difference", 1) < 1e-6]) == 4
    assert [line["layers_taken_apart"] for line in of(lines, "adapters") if "layers_taken_apart" in line] == [14, 0]
    ours, pefts = (line for line in of(lines, "row") if "way" in line)
    assert ours["tokens_per_s"] == pytest.approx(160 / ours["seconds"]) and pefts["planned_gib"] > 0
    assert sum("kernel" in line for line in of(lines, "kernels")) == 25


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or torch.version.cuda is not None, reason="needs a C++ compiler and a CPU's torch")
def test_the_run_without_vllm_on_a_card_made_of_main_memory(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert COMPILER is not None and request.config.cache is not None
    names = ["attention", "residency", "gradients", "adapters", "row"]  # no compiler of kernels, and no profile of them
    options = ["1", "--tiny", "--seconds", "3000", "--output", str(tmp_path), "--only", *names]
    command = [sys.executable, "-c", ON_CARD, COMPILER, str(request.config.cache.mkdir("cuda_on_cpu")), *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu_first_1.jsonl").read_text().splitlines()]
    assert [line["check"] for line in lines if line.get("ok")] == names
    assert 0 < of(lines, "row")[-2]["peak_gib"] < 0.01 and of(lines, "residency")[0]["moved_gib"] > 0
    assert 0 < of(lines, "adapters")[-2]["relative_difference"] < 0.02, "16 bits, added in another order"


@pytest.mark.vllm
@pytest.mark.slow
def test_the_run_with_vllm(tmp_path: Path) -> None:
    lines = carried_out("2", tmp_path)
    assert [line["check"] for line in lines if "ok" in line] == [
        "start", "speed", "mismatch", "adapter", "seeds", "sleep", "grpo", "host", "ppo", "merged",
    ]  # fmt: skip
    rounded, exact, _, _ = of(lines, "mismatch")
    assert exact["mean_abs"] < 1e-5 and rounded["mean_abs"] > 1e-4
    assert of(lines, "adapter")[1]["moved"]["mean_abs"] > 1e-2
    for name in ("grpo", "ppo"):
        assert [line["step"] for line in of(lines, name) if "step" in line] == [1, 2]
    assert any("engines/vllm.py" in line.get("function", "") for line in of(lines, "host"))


def fails(bench: Bench) -> None:
    bench.note(figure=1)
    bench.within(0.5, gap=float("nan"))


def holds(bench: Bench) -> None:
    bench.note(figure=2)
    assert json.loads(bench.path.read_text().splitlines()[-1]) == {"check": "holds", "figure": 2}, "written at once"


def hangs(_: Bench) -> None:
    time.sleep(60)


def made(tmp_path: Path) -> tuple[Bench, Path]:
    path = tmp_path / "lines.jsonl"
    return Bench(tmp_path, "cpu", True, path), path


def test_a_check_that_fails_says_so_and_the_next_one_runs(tmp_path: Path) -> None:
    bench, path = made(tmp_path)
    assert not carry_out([Check(fails, 1), Check(holds, 1)], bench, 60)
    figure, gap, failed, _, held = map(json.loads, path.read_text().splitlines())
    assert figure == {"check": "fails", "figure": 1} and gap == {"check": "fails", "gap": None, "limit": 0.5}
    assert not failed["ok"] and failed["wrong"] == "MissedError: gap is nan, above 0.5"
    assert held["ok"] and "wrong" not in held


def test_a_check_that_would_not_fit_is_skipped_and_named(tmp_path: Path) -> None:
    bench, path = made(tmp_path)
    assert not carry_out([Check(fails, 90), Check(holds, 10)], bench, 60)
    skipped, *_, held = map(json.loads, path.read_text().splitlines())
    assert skipped["check"] == "fails" and "90 s, and 60 s are left" in skipped["skipped"]
    assert held["ok"]
    assert carry_out([Check(holds, 10)], bench, 60)


def test_a_check_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "LEAST", 0.2)
    bench, path = made(tmp_path)
    assert not carry_out([Check(hangs, 0), Check(holds, 0)], bench, 60)
    ended, _, held = map(json.loads, path.read_text().splitlines())
    assert ended["wrong"] == "TimeoutError: not done after 0 s" and held["ok"]


def test_where_the_card_no_longer_answers_another_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    monkeypatch.setattr(os, "execv", lambda program, argv: started.append(argv))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "gpu_first", "1"])
    bench, _ = made(tmp_path)
    bench.device = "cuda"
    carry_out([Check(fails, 1), Check(holds, 1), Check(hangs, 90)], bench, 60)
    first, *_ = started
    assert first[:5] == ["python", "-m", "gpu_first", "1", "--seconds"] and 50 < float(first[5]) <= 60
    assert first[6:] == ["--only", "holds", "hangs"]


def test_a_check_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_first.main(["1", "--device", "cpu", "--tiny", "--only", "speed", "row", "--output", str(tmp_path)])
    assert "run 1 has no speed, but probe, attention, residency" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_card_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_first.main(["1", "--output", str(tmp_path / "results")])
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())
