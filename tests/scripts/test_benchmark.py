"""The benchmark: what it measures with, what it makes of the figures, and our own side for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from nanorlhf.scripts import benchmark

SECONDS = {"ours": 2.0, "trl, micro-batch 8": 30.0, "trl, micro-batch 32": 20.0}  # of others: 40
PEAKS = {"ours": 300.0, "trl, micro-batch 8": 1500.0, "trl, micro-batch 32": 2100.0}  # of others: 3,000


def made_up(loss: float, order: list[str]) -> Any:
    def run(*asked: Any) -> dict[str, Any]:
        order.append(name := str(asked[2]))
        if name == "loaded":
            return {"baseline_mib": 150.0, "parameters": 7}
        nth = order.count(name)  # 1 off, right, far off: the median is right
        seconds = SECONDS.get(name, 40.0) + (-1.0, 0.0, 100.0)[nth - 1 if nth < 4 else 1]
        memory = {"baseline_mib": 100.0 if name == "ours" else 300.0, "peak_mib": PEAKS.get(name, 3000.0)}
        figures = {"loss": 0.5 if name == "ours" else loss, "grad_norm": 0.1}
        return {"setting": name, "seconds": seconds, "cpu_seconds": seconds / 2} | memory | figures

    return run


@pytest.mark.parametrize(("loss", "code"), [(0.5, 0), (0.5 * 1.0009, 0), (0.49, 1)])
def test_ours_against_the_best_of_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loss: float, code: int
) -> None:
    order: list[str] = []
    monkeypatch.setattr(benchmark, "in_a_process", made_up(loss, order))
    monkeypatch.setattr(benchmark, "find_spec", lambda name: name)
    argv = ["--only", "update", "--repeats", "3", "--size", "tiny", "--threads", "1", "--output", str(tmp_path)]
    assert benchmark.main(argv) == code
    assert order[0] == "loaded" and set(order[1::2]) == {"ours"} and order[2::2] == [str(s) for s in benchmark.TRL] * 3
    report = json.loads((tmp_path / "benchmark_update.json").read_text())
    assert report["medians"]["trl, micro-batch 32"]["seconds"] == 20
    assert report["trl_best"]["seconds"] == "trl, micro-batch 32"  # time and memory each at its own best
    assert report["trl_best"]["peak_mib"] == "trl, micro-batch 8"
    ratios = {name: round(ratio, 6) for name, ratio in report["trl_over_ours"].items()}
    assert ratios == {
        "seconds": 10, "cpu_seconds": 10, "above_start_mib": 6, "above_loaded_mib": 9, "peak_mib": 5,
    }  # fmt: skip
    assert report["agreement"]["loss"] == pytest.approx(abs(loss / 0.5 - 1)) and report["agreement"]["grad_norm"] == 0
    assert len(report["runs"]) == 24 and report["machine"]["threads"] == 1 and report["versions"]["torch"]
    printed = capsys.readouterr().out
    assert ["TRL's", "best", "/", "ours", "10.0", "10.0", "6.0", "9.0", "5.0"] in [
        x.split() for x in printed.split("\n")
    ]


def test_the_workload_is_the_one_it_claims_to_be() -> None:
    work = benchmark.SIZES["full"]
    lengths = sorted(work.lengths)
    assert len(lengths) == 32 and max(lengths) <= 1024
    assert lengths[15] < 128 < lengths[16]
    samples = work.rollout()
    assert [len(s["completion_ids"]) for s in samples] == work.lengths
    assert all(16 <= len(s["prompt_ids"]) <= 32 and len(s["logprobs"]) == len(s["completion_ids"]) for s in samples)
    for group in (samples[i : i + 8] for i in range(0, 32, 8)):
        assert len({tuple(s["prompt_ids"]) for s in group}) == 1 and {s["reward"] for s in group} == {0.0, 1.0}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**work.model))
    assert model.num_parameters() == pytest.approx(11.5e6, rel=0.005)


@pytest.mark.slow
def test_our_side_for_real(tmp_path: Path) -> None:
    argv = ["--only", "update", "outlier", "--alone", "--repeats", "1", "--size", "tiny", "--threads", "1"]
    argv += ["--output", str(tmp_path / "new")]
    assert benchmark.main(argv) == 0
    report = json.loads((tmp_path / "new" / "benchmark_update.json").read_text())
    (run,) = report["runs"]
    assert run["seconds"] > 0 and run["cpu_seconds"] > 0
    assert run["peak_mib"] > run["baseline_mib"] > 100
    assert run["grad_norm"] > 0 and report["trl_over_ours"] == {}
    assert report["workload"]["completion_tokens"] == sum(benchmark.SIZES["tiny"].lengths)
    report = json.loads((tmp_path / "new" / "benchmark_outlier.json").read_text())
    assert report["workload"]["longest_completion"] == 64 and report["runs"][0]["grad_norm"] > 0


def test_trl_is_given_the_largest_micro_batch_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    measured, limits = made_up(0.5, order), []

    def run(folder: Any, work: Any, setting: Any, _: int, limit_gib: float = 0.0) -> dict[str, Any] | None:
        limits.append(limit_gib)
        fits = setting.side != "trl" or (setting.micro_batch <= 8 and setting.checkpointing)
        return measured(folder, work, setting) if fits else None

    monkeypatch.setattr(benchmark, "in_a_process", run)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: name)
    argv = ["--only", "outlier", "--repeats", "2", "--limit_gib", "12", "--output", str(tmp_path)]
    assert benchmark.main(argv) == 0
    best = "trl, micro-batch 8, checkpointing"
    assert order == ["loaded", best, "ours", best, "ours", best]
    assert limits == [0, *[12] * 6, 0, 12, 0, 12]  # only TRL's processes are held to it
    assert json.loads((tmp_path / "benchmark_outlier.json").read_text())["trl_best"]["seconds"] == best


def test_a_process_that_needs_more_memory_than_there_is(tmp_path: Path) -> None:
    full = "import sys; print(sys.argv, 'DefaultCPUAllocator: can't allocate memory', file=sys.stderr); sys.exit(1)"
    assert "allocate" in str(benchmark.spawn(tmp_path, full, "a", threads=1))
    assert benchmark.spawn(tmp_path, "pass", threads=1) is None
    with pytest.raises(SystemExit, match="ended with 3"):
        benchmark.spawn(tmp_path, "import sys; sys.exit(3)", threads=1)


def test_the_limit_is_real(tmp_path: Path) -> None:
    work, threads = benchmark.SIZES["tiny"], 1
    benchmark.prepare(tmp_path, work)
    assert benchmark.in_a_process(tmp_path, work, benchmark.OURS, threads, limit_gib=0.2) is None


def test_one_long_answer_among_short_ones() -> None:
    lengths = sorted(benchmark.OUTLIER["full"].lengths)
    assert len(lengths) == 32 and lengths[-1] == 4096 and lengths[-2] <= 256
    assert benchmark.OUTLIER["full"].limit == 4096


def test_without_trl_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    assert benchmark.main(["--output", str(tmp_path)]) == 2
    assert "[bench]" in capsys.readouterr().err and not list(tmp_path.iterdir())
