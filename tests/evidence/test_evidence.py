"""The README's tables are those of results/, and what is measured is not measured again."""

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
        "trl, 32": {"seconds": 240.0, "above_start_mib": 2000.0},
    }
    found = {"medians": medians, "trl_best": {"seconds": "trl, 32", "above_start_mib": "trl, 8"}}
    found |= {"trl_over_ours": {"seconds": 120.0, "above_start_mib": 15.0}, "agreement": {"loss": 1e-7, "grad": 2e-6}}
    (results / "benchmark_rloo.json").write_text(json.dumps(found))
    readme = tmp_path / "README.md"
    marks = "".join(
        f"{__main__.START.format(claim)}\nold\n{__main__.END}\nkept {claim}\n" for claim in ("engines", "rivalry")
    )
    readme.write_text(f"before\n{marks}after\n")
    __main__.write_tables(readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("kept rivalry\nafter\n")
    assert "old" not in text
    assert "| a | 0.900 ± 0.090 | 0.900 ± 0.090 | 0.900 ± 0.090 | 10 ± 0 |" in text
    assert "- No difference exceeds the noise at equal time, nor at equal samples, nor over the last fifth." in text
    assert "| RLOO's update | 2 | 100 | 240 | 1,500 | 120.0 | 15.0 | 2e-06 |" in text
    __main__.write_tables(readme)
    assert readme.read_text() == text


def test_what_is_there_is_not_measured_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (results / "family.json").write_text("{}")
    (results / "benchmark_update.json").write_text("{}")
    monkeypatch.setattr(__main__.compare, "main", lambda words: pytest.fail(f"compared {words}"))
    assert __main__.made("family", 3)
    assert __main__.made("benchmark_update", 3)


def test_the_readme_is_up_to_date(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    __main__.write_tables(copy)
    assert copy.read_text() == (ROOT / "README.md").read_text(), "make evidence ARGS=--tables writes it"
