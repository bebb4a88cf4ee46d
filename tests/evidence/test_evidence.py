"""The tables of README and docs are those of results/, and what is measured is not measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evidence import __main__
from evidence.results import ROOT
from nanorlhf.scripts.comparing.publish import to_text
from tests.scripts.comparing.test_verdicts import a_run


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(__main__, "RESULTS", folder)
    return folder


def test_tables_go_between_their_marks(results: Path, tmp_path: Path) -> None:
    runs = [a_run(name, seed, end) for name in ("a", "b") for seed, end in enumerate((0.9, 1.0, 1.1))]
    (results / "engines.json").write_text(to_text(runs))
    medians = {
        "ours": {"seconds": 2.0, "above_start_mib": 100.0},
        "trl, 8": {"seconds": 300.0, "above_start_mib": 1500.0},
        "trl, 32": {"seconds": 239.96, "above_start_mib": 2000.0},
    }
    found = {"medians": medians, "trl_best": {"seconds": "trl, 32", "above_start_mib": "trl, 8"}}
    found |= {"agreement": {"loss": 1e-7, "grad": 2e-6}}
    gave_up = [{"setting": "trl, 8"}, {"setting": "trl, 32", "gave_up": True}]
    (results / "benchmark_rloo.json").write_text(json.dumps(found | {"runs": gave_up[:1]}))
    (results / "benchmark_goal.json").write_text(json.dumps(found | {"runs": gave_up}))
    lean = {name.replace("ours", "ours, rows of 256 tokens"): figures for name, figures in medians.items()}
    (results / "benchmark_smol_lean.json").write_text(json.dumps(found | {"medians": lean, "runs": gave_up[:1]}))
    page = tmp_path / "measured.md"
    marks = "".join(
        f"{__main__.START.format(claim)}\nold\n{__main__.END}\nkept {claim}\n" for claim in ("engines", "rivalry")
    )
    page.write_text(f"before\n{marks}after\n")
    __main__.write_tables(page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("kept rivalry\nafter\n")
    assert "old" not in text
    assert "| a | 0.900 ± 0.090 | 0.900 ± 0.090 | 0.900 ± 0.090 | 10 ± 0 |" in text
    assert "- No difference exceeds the noise at equal time, nor at equal samples, nor over the last fifth." in text
    assert "| RLOO's update | 2 | 100 | 240 | 1,500 | 120.0 | 15.0 | 2e-06 |" in text
    assert "| the same, each side with as little memory as it can | 2 | 100 | 240 | 1,500 |" in text
    assert "| the shipped task, until .90 | 2 | - | 240 | - | >119.9 | - | 2e-06 |" in text
    __main__.write_tables(page)
    assert page.read_text() == text


def test_the_readme_shows_each_figure_with_the_rivals_best_in_it(results: Path) -> None:
    medians = {
        "ours": {"seconds": 2.0, "above_start_mib": 100.0},
        "trl, 8": {"seconds": 60.0, "above_start_mib": 1280.0},
        "trl, 32": {"seconds": 15.0, "above_start_mib": 6000.0},
    }
    found = {"medians": medians, "trl_best": {"seconds": "trl, 32", "above_start_mib": "trl, 8"}, "runs": []}
    (results / "benchmark_update.json").write_text(json.dumps(found))
    _, _, *rows = __main__.strongest().splitlines()
    assert [row.split(" | ", 1)[1] for row in rows] == ["2.0 s | 15 s | 7.5 |", "100 MiB | 1,280 MiB | 12.8 |"]


def test_what_is_there_is_not_measured_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (results / "family.json").write_text("{}")
    (results / "benchmark_update.json").write_text("{}")
    monkeypatch.setattr(__main__.compare, "main", lambda words: pytest.fail(f"compared {words}"))
    assert __main__.made("family", 3)
    assert __main__.made("benchmark_update", 3)


def test_records_are_medians_of_the_fastest_setting(results: Path) -> None:
    times = {"ours": (9.0, 5.0, 7.0), "ours, hf": (11.0, 12.0, 13.0), "trl, 8": (20.0, 40.0, 30.0)}
    runs = [
        {"setting": name, "seconds": s, "steps": 6, "reached": s < 40, "from_start_seconds": s + 20}
        for name, some in times.items()
        for s in some
    ]
    about = {"date": "2026-11-29T10:00:00+00:00", "commit": "0123456789", "machine": {"cores": 2, "cpu": "fast"}}
    (results / "benchmark_smol_goal.json").write_text(json.dumps(about | {"runs": runs}))
    *_, row = __main__.records().splitlines()
    goal = "smol | SmolLM2-135M, one-digit arithmetic in tags, .80"
    assert row == f"| {goal} | 27 | 7.0 | 6 | 30.0 (1 of 3 never) | 6 | 2026-11-29 | 0123456 | 2 cores, fast |"


@pytest.mark.parametrize("page", __main__.PAGES)
def test_the_pages_are_up_to_date(page: str, tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text((ROOT / page).read_text())
    __main__.write_tables(copy)
    assert copy.read_text() == (ROOT / page).read_text(), "make evidence ARGS=--tables writes it"
