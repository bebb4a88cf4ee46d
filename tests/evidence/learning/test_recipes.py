"""Measurements of recipes and pipelines on the small model: each stage runs, goes on from the last, and is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evidence.learning import commands, counting, grade_school, recipes, rlhf


@pytest.mark.slow
def test_stages_follow_each_other_and_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["digits", "--only", "sft, grpo", "--seeds", "1", "--size", "tiny", "--output", str(tmp_path / "runs.json")]
    assert recipes.main(argv) == 0
    (run,) = json.loads((tmp_path / "runs.json").read_text())
    assert [stage["algorithm"] for stage in run["stages"]] == ["sft", "grpo"]
    first, second = (stage["curve"] for stage in run["stages"])
    assert [point["step"] for point in first] == [0, 2] and {"reward", "numeric", "loss"} <= first[0].keys()
    assert second[0]["reward"] == first[-1]["reward"], "GRPO did not go on from what SFT left"
    assert run["stages"][1]["samples"]["last"][0]["completion"]
    recipes.draw([{"variant": "grpo", "stages": run["stages"][1:]}], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    one = {"variant": "grpo", "seed": 0, "stages": run["stages"][1:]}
    one["stages"][0]["samples"]["last"][0] |= {"completion": "7 |\n8", "reward": 0.5}
    assert recipes.examples([one, one | {"seed": 1}, run]).splitlines()[3:] == ["| grpo | 2 | 0.50 | 7 \\| 8 |"]
    before = capsys.readouterr().out
    assert "| sft, grpo: grpo | 1 | 2 |" in before
    assert recipes.main(argv) == 0, "a run that is there is not run again"
    assert "step 1/2" not in capsys.readouterr().out


def test_an_unknown_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        recipes.main(["digits", "--only", "grpo, sft", "--output", str(tmp_path / "runs.json")])


@pytest.mark.slow
@pytest.mark.evidence
@pytest.mark.filterwarnings("ignore")
def test_the_pipeline_goes_from_pairs_to_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--seeds", "1", "--size", "tiny", "--output", str(tmp_path / "rlhf.json"), "--runs", str(tmp_path / "runs")]
    argv += ["--picture", str(tmp_path / "rlhf.png")]
    assert rlhf.main(argv) == 0
    (run,) = json.loads((tmp_path / "rlhf.json").read_text())
    assert list(run["stages"]) == ["sft", "reward_model", "ppo", "online_dpo"]
    for name in ("ppo", "online_dpo"):
        ends = run["stages"][name]["curve"][0], run["stages"][name]["curve"][-1]
        assert all({"model", "lexical_richness"} <= end.keys() for end in ends)
        assert ends[0]["reward"] == pytest.approx(ends[0]["model"]), "the true score is only looked at"
    assert run["stages"]["ppo"]["curve"][0] == run["stages"]["online_dpo"]["curve"][0] | {
        "step": 0, "length_mean": run["stages"]["ppo"]["curve"][0]["length_mean"]
    }  # fmt: skip
    assert "accuracy" in run["stages"]["reward_model"]["curve"][-1]
    assert (tmp_path / "rlhf.png").stat().st_size > 1000
    capsys.readouterr()
    assert rlhf.main(argv) == 0
    assert "step 1/2" not in capsys.readouterr().out


def test_pairs_and_demonstrations_come_from_the_same_answers() -> None:
    samples = [
        {"index": index, "prompt": f"p{index}", "completion": f"c{score}", "reward": score}
        for index, score in ((0, 0.2), (0, 0.9), (1, 0.5), (1, 0.1))
    ]
    assert list(rlhf.best(samples)) == [
        {"prompt": "p0", "completion": "c0.9"},
        {"prompt": "p1", "completion": "c0.5"},
    ]
    assert next(rlhf.grades(samples)) == {"prompt": "p0", "completions": ["c0.2", "c0.9"], "scores": [0.2, 0.9]}


def test_a_gain_is_paired_by_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two templates one goes from half to all right, the other, with two problems, from a quarter to nothing."""
    monkeypatch.setattr(grade_school, "gsm_symbolic", lambda _: {"template": [5, 9, 9]})
    right = {
        "sft": {"0": [True, False], "1": [False, False], "2": [True, False]},
        "grpo": {"0": [True, True], "1": [False, False], "2": [False, False]},
    }
    assert grade_school.by_template(right["sft"], 1) == {5: 0.5, 9: 0.25}
    assert grade_school.by_template(right["sft"], 2) == {5: 1.0, 9: 0.5}
    mean, low, high = grade_school.gain([{"right": right}] * 3, 1)
    assert (mean, low, high) == pytest.approx((0.125, -0.25, 0.5))


def test_a_number_is_right_with_and_without_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grade_school, "gsm_symbolic", lambda _: {"answer": ["3+4=7\n#### 7", "#### 12"]})
    said = [(0, "#### 7"), (1, "It is 12."), (0, "7, or rather 8"), (1, "12 less 5\n#### 7")]
    samples = [{"index": index, "completion": text} for index, text in said]
    verdicts = grade_school.numbers_right(samples)
    assert verdicts == [True, True, False, False]
    assert grade_school.by_problem(samples, verdicts) == {"0": [True, False], "1": [True, False]}


@pytest.mark.slow
@pytest.mark.evidence
def test_grade_school_stages_are_judged_by_held_out_templates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--seeds", "1", "--size", "tiny", "--output", str(tmp_path / "gsm.json"), "--runs", str(tmp_path / "runs")]
    assert grade_school.main(argv) == 0
    (run,) = json.loads((tmp_path / "gsm.json").read_text())
    assert list(run["right"]) == ["base", "sft", "grpo"] and len(run["right"]["grpo"]) == 16
    assert (tmp_path / "runs" / "base.json").exists() and not (tmp_path / "runs" / "seed0" / "base.json").exists()
    for verdicts in (run["right"], run["unmarked"]):
        assert all(len(answers) == 8 for answers in verdicts["base"].values())
    assert "pass@8: GRPO after SFT, less SFT alone" in capsys.readouterr().out


def test_a_run_that_was_stopped_has_not_ended(tmp_path: Path) -> None:
    assert not commands.ended(tmp_path)
    (tmp_path / "config.yaml").write_text("max_steps: 3\n")
    for step, ended in ((2, False), (3, True)):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{{"step": {step}}}\n')
        assert commands.ended(tmp_path) == ended


@pytest.mark.slow
@pytest.mark.evidence
def test_counting_keeps_rewards_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--seeds", "1", "--size", "tiny", "--output", str(tmp_path / "runs.json"), "--runs", str(tmp_path / "runs")]
    assert counting.main(argv) == 0
    (run,) = json.loads((tmp_path / "runs.json").read_text())
    assert run["steps"] == 2 and run["after"] == run["curve"][-1]["reward"] and 0 < run["length_longest"] <= 64
    assert "| 1 | 2 |" in capsys.readouterr().out
    assert counting.main(argv) == 0 and "step 1/2" not in capsys.readouterr().out
