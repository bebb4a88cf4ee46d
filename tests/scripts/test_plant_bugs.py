"""Bugs that are known still fit the code, name tests that are there, and are found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanorlhf.scripts import plant_bugs
from nanorlhf.scripts.plant_bugs import read_bugs
from nanorlhf.scripts.results import ROOT

BUGS = read_bugs()
QUICKEST = "A completion that is too short is rewarded for it, by a sign."
# Each of these files guards something that no other does, so no slimmer suite may lose all that it finds.
NEEDED = ["loop", "bandit", "advantages", "losses", "attention", "budget", "residency", "trainer", "memory", "trust"]
NEEDED += ["sandbox", "wrong_input", "structure", "readme", "team"]


def test_there_are_forty_or_more_and_each_is_another() -> None:
    assert len(BUGS) == len({bug.name for bug in BUGS}) == len({(bug.file, bug.old, bug.new) for bug in BUGS}) >= 40


def test_they_fit_and_change_something() -> None:
    assert {bug.name: complaints for bug in BUGS if (complaints := bug.misfits())} == {}
    assert all(bug.tests and bug.old != bug.new for bug in BUGS)


def test_what_no_longer_fits_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lost = replace(
        BUGS[0], name="Lost.", old="no such text", tests=["tests/test_kl.py::test_none", "tests/test_none.py"]
    )
    monkeypatch.setattr(plant_bugs, "read_bugs", lambda: [lost])
    assert plant_bugs.main([]) == 1
    said = capsys.readouterr().err
    assert f"Lost. {lost.file} holds its text 0 times" in said
    assert "there is no tests/test_kl.py::test_none\n" in said and "there is no tests/test_none.py\n" in said


def test_no_file_of_tests_that_is_needed_can_go_unnoticed() -> None:
    named = {test.partition("::")[0] for bug in BUGS for test in bug.tests}
    rewards = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "rewards").glob("test_*.py")}
    assert {f"tests/test_{name}.py" for name in NEEDED} | rewards <= named


@pytest.mark.slow
def test_a_bug_is_planted_and_found(capsys: pytest.CaptureFixture[str]) -> None:
    (bug,) = [bug for bug in BUGS if bug.name == QUICKEST]
    before = (ROOT / bug.file).read_text()
    assert plant_bugs.main(["--only", QUICKEST]) == 0
    said = capsys.readouterr().out
    assert said.startswith("found ") and said.endswith(f"{QUICKEST}\n1 of 1 were found\n")
    assert (ROOT / bug.file).read_text() == before
