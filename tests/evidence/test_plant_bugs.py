"""Bugs that are known still fit the code, name tests that are there, and are found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evidence import plant_bugs
from evidence.plant_bugs import read_bugs
from evidence.results import ROOT

BUGS = read_bugs()
QUICKEST = "A completion that is too short is rewarded for it, by a sign."
# Each of these files guards something that no other does, so no slimmer suite may lose all that it finds.
NEEDED = ["loop", "bandit", "trainer", "trust", "wrong_input", "structure", "readme"]
ROOMS = ["formulas/test_advantages", "formulas/test_losses", "policy/test_attention", "learning/test_passes"]
ROOMS += ["memory/test_residency", "memory/test_plan", "sandbox/test_run", "system/test_distributed"]


def test_there_are_forty_or_more_and_each_is_another() -> None:
    assert len(BUGS) == len({bug.name for bug in BUGS}) == len({(bug.file, bug.old, bug.new) for bug in BUGS}) >= 40


def test_they_fit_and_change_something() -> None:
    assert {bug.name: complaints for bug in BUGS if (complaints := bug.misfits())} == {}
    assert all(bug.tests and bug.old != bug.new for bug in BUGS)


def test_what_no_longer_fits_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lost = replace(
        BUGS[0], name="Lost.", old="no such text", tests=["tests/formulas/test_kl.py::test_none", "tests/test_none.py"]
    )
    monkeypatch.setattr(plant_bugs, "read_bugs", lambda: [lost])
    assert plant_bugs.main([]) == 1
    said = capsys.readouterr().err
    assert f"Lost. {lost.file} holds its text 0 times" in said
    assert "there is no tests/formulas/test_kl.py::test_none\n" in said and "there is no tests/test_none.py\n" in said


def test_no_file_of_tests_that_is_needed_can_go_unnoticed() -> None:
    named = {test.partition("::")[0] for bug in BUGS for test in bug.tests}
    rewards = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "rewards").glob("test_*.py")}
    assert {f"tests/test_{name}.py" for name in NEEDED} | {f"tests/{name}.py" for name in ROOMS} | rewards <= named


@pytest.mark.evidence
@pytest.mark.slow
def test_a_bug_is_planted_and_found(capsys: pytest.CaptureFixture[str]) -> None:
    (bug,) = [bug for bug in BUGS if bug.name == QUICKEST]
    before = (ROOT / bug.file).read_text()
    assert plant_bugs.main(["--only", QUICKEST]) == 0
    said = capsys.readouterr().out
    assert said.startswith("found ") and said.endswith(f"{QUICKEST}\n1 of 1 were found\n")
    assert (ROOT / bug.file).read_text() == before
