"""Scaling: the workloads, what is made of the figures, and both for real on a tiny model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from evidence.speed import benchmark, scaling, step_times
from evidence.speed.workloads import Workload

OPTIONS = argparse.Namespace(size="tiny", repeats=3, threads=1)


def costing(fixed: float, per_token: float, order: list[int]) -> Any:
    """Runs that cost so much; the first of each is an outlier."""

    def run(_: Path, work: Workload, __: int) -> dict[str, Any]:
        order.append(work.prompts)
        live = scaling.row_tokens(work, work.flat)
        seconds = fixed + per_token * live + (100 if order.count(work.prompts) == 1 else 0)
        return {"seconds": 2 * seconds, "cpu_seconds": seconds}

    return run


@pytest.mark.parametrize(("fixed", "holds"), [(0.0, True), (3.0, False)])
def test_linear_is_linear(fixed: float, holds: bool) -> None:
    order: list[int] = []
    *_, report = scaling.linearity(OPTIONS, costing(fixed, 0.01, order))
    assert order == [4, 8, 16] * 3
    first, *_ = report["rows"]
    assert report["holds"] == holds and first["of_linear"] == 1
    assert [row["of_linear"] for row in report["rows"]] == pytest.approx(
        [(fixed / row["row_tokens"] + 0.01) / (fixed / first["row_tokens"] + 0.01) for row in report["rows"]]
    )
    assert ("as expected: yes" if holds else "as expected: NO") in scaling.as_table(report)


@pytest.mark.parametrize(("fixed", "holds"), [(0.0, True), (8.0, False)])
def test_what_is_left_out_saves_its_share(fixed: float, holds: bool) -> None:
    reports = list(scaling.dropping(OPTIONS, costing(fixed, 0.01, [])))
    report = reports[-1]
    assert len(reports) == 12 and report["holds"] == holds
    assert [row["flat_groups"] for row in report["rows"]] == [0, 0.25, 0.5, 0.75]
    shares = [row["tokens_left_out"] for row in report["rows"]]
    assert shares[0] == 0 and shares == sorted(shares) and 0.6 < shares[-1] < 0.9
    if not fixed:
        assert [row["time_saved"] for row in report["rows"]] == pytest.approx(shares)


def test_full_workloads_are_many_short_samples() -> None:
    lengths = scaling.SHORT["full"].lengths
    assert len(lengths) == 64 and max(lengths) <= 256 and 40 < sorted(lengths)[32] < 90


@pytest.mark.evidence
@pytest.mark.slow
def test_both_for_real(tmp_path: Path) -> None:
    argv = ["--only", "linearity", "dropping", "--repeats", "1", "--size", "tiny", "--threads", "1"]
    benchmark.main([*argv, "--output", str(tmp_path)])
    report = json.loads((tmp_path / "benchmark_dropping.json").read_text())
    dropped = [runs[0]["samples/dropped_fraction"] for runs in report["runs"]]
    assert dropped == [0, 0.25, 0.5, 0.75]
    trained = [runs[0]["tokens/trained"] for runs in report["runs"]]
    assert trained == sorted(trained, reverse=True) and trained[-1] < trained[0] / 2
    report = json.loads((tmp_path / "benchmark_linearity.json").read_text())
    trained = [runs[0]["tokens/trained"] for runs in report["runs"]]
    assert trained[1] == pytest.approx(2 * trained[0], rel=0.05) and trained[2] == pytest.approx(
        4 * trained[0], rel=0.05
    )


@pytest.mark.parametrize("extra", [0, 1])
def test_a_prompt_counts_once_however_large_its_group(extra: int, tmp_path: Path) -> None:
    def run(_: Path, work: Workload, __: int) -> dict[str, Any]:
        return {"seconds": 1.0, "cpu_seconds": 1.0, "row_tokens": scaling.row_tokens(work) + extra}

    *_, report = scaling.sharing(OPTIONS, run)
    assert [row["group"] for row in report["rows"]] == list(scaling.GROUPS)
    assert [row["expected"] for row in report["rows"]] == [2 * (40 + 4 * size) for size in scaling.GROUPS]
    assert [row["written"] for row in report["rows"]] == [2 * size * (40 + 4) for size in scaling.GROUPS]
    assert report["holds"] == (not extra)
    scaling.draw_sharing(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.evidence
@pytest.mark.filterwarnings("ignore")
def test_a_steps_parts_add_up_and_its_products_are_found(tmp_path: Path) -> None:
    assert step_times.main(["--size", "tiny", "--output", str(tmp_path / "times.json")]) == 0
    found = json.loads((tmp_path / "times.json").read_text())
    assert sum(found["parts"].values()) == pytest.approx(found["step"])
    assert all(seconds >= 0 for seconds in found["parts"].values())
    products = found["products_of_the_update"]
    assert products["count"] > 20 and 0 < products["within_the_step"] < found["step"]
