"""The benchmark: what it measures with, what it makes of the figures, and our own side for real."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from evidence.speed import benchmark, contest, ours, time_to_reward, trl_engines, trl_updates
from evidence.speed.benchmark import TINY
from evidence.speed.workloads import OURS, Meter, Setting, Workload, prepare, typical

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


@pytest.mark.parametrize(("loss", "code"), [(0.5, 0), (0.5 * 1.000009, 0), (0.5 * 1.00002, 1)])
def test_ours_against_the_best_of_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loss: float, code: int
) -> None:
    order: list[str] = []
    monkeypatch.setattr(contest, "in_a_process", made_up(loss, order))
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
    work = benchmark.WORKS["update"]["full"]
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
@pytest.mark.evidence
def test_our_side_for_real(tmp_path: Path) -> None:
    argv = ["--only", "update", "outlier", "--alone", "--repeats", "1", "--size", "tiny", "--threads", "1"]
    argv += ["--output", str(tmp_path / "new")]
    assert benchmark.main(argv) == 0
    report = json.loads((tmp_path / "new" / "benchmark_update.json").read_text())
    (run,) = report["runs"]
    assert run["seconds"] > 0 and run["cpu_seconds"] > 0
    assert run["peak_mib"] > run["baseline_mib"] > 100
    assert run["grad_norm"] > 0 and report["trl_over_ours"] == {}
    assert report["workload"]["completion_tokens"] == sum(benchmark.WORKS["update"]["tiny"].lengths)
    report = json.loads((tmp_path / "new" / "benchmark_outlier.json").read_text())
    assert report["workload"]["longest_completion"] == 64 and report["runs"][0]["grad_norm"] > 0


def test_trl_is_given_the_largest_micro_batch_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    measured, limits = made_up(0.5, order), []

    def run(folder: Any, contest: contest.Contest, setting: Any, _: int) -> dict[str, Any] | None:
        limits.append(contest.limit_gib)
        fits = setting.side != "trl" or (setting.micro_batch <= 8 and setting.checkpointing)
        return measured(folder, contest, setting) if fits else None

    monkeypatch.setattr(contest, "in_a_process", run)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: name)
    argv = ["--only", "outlier", "--repeats", "2", "--limit_gib", "12", "--output", str(tmp_path)]
    assert benchmark.main(argv) == 0
    best = "trl, micro-batch 8, checkpointing"
    assert order == ["loaded", best, "ours", best, "ours", best]
    assert set(limits) == {12}
    assert json.loads((tmp_path / "benchmark_outlier.json").read_text())["trl_best"]["seconds"] == best


def test_a_process_that_needs_more_memory_than_there_is(tmp_path: Path) -> None:
    full = "import sys; print(sys.argv, 'DefaultCPUAllocator: can't allocate memory', file=sys.stderr); sys.exit(1)"
    assert "allocate" in str(contest.spawn(tmp_path, full, "a", threads=1))
    assert contest.spawn(tmp_path, "pass", threads=1) is None
    with pytest.raises(SystemExit, match="ended with 3"):
        contest.spawn(tmp_path, "import sys; sys.exit(3)", threads=1)


def test_the_limit_is_real_and_only_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(contest, "spawn", lambda _, __, *asked, **___: given.append(asked[3]) or "full")
    limited = contest.Contest("update", TINY, benchmark.TRL, limit_gib=0.2)
    for setting in (contest.OURS, contest.LOADED, *benchmark.TRL[:1]):
        assert contest.in_a_process(tmp_path, limited, setting, 1) is None
    assert given == ["0.0", "0.0", "0.2"]
    monkeypatch.undo()
    prepare(tmp_path, TINY)
    assert contest.in_a_process(tmp_path, limited, benchmark.TRL[0], 1) is None


def test_one_long_answer_among_short_ones() -> None:
    lengths = sorted(benchmark.WORKS["outlier"]["full"].lengths)
    assert len(lengths) == 32 and lengths[-1] == 4096 and lengths[-2] <= 256
    assert benchmark.WORKS["outlier"]["full"].limit == 4096


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "TRL is not installed: pip install -e .[bench], or --alone"),
        (["--alone", "--repeats", "0"], "argument --repeats: invalid count value: '0'"),
        (["--alone", "--threads", "-1"], "argument --threads: invalid count value: '-1'"),
        (["--alone", "--limit_gib", "0"], "argument --limit_gib: it must be above 0"),
        (["--alone", "--only", "ppo"], "argument --only: invalid choice: 'ppo'"),
        (["--alone", "--output", __file__], "is no folder"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_never_got_there_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def run(folder: Any, asked: contest.Contest, setting: Setting, _: int) -> dict[str, Any]:
        figures = made_up(0.5, order)(folder, asked, setting)
        if setting.side == "loaded":
            return figures
        del figures["loss"], figures["grad_norm"]
        return figures | {"reached": setting.side == "ours" or setting.seed < 2}

    monkeypatch.setattr(contest, "in_a_process", run)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: name)
    argv = ["--only", "goal", "--size", "tiny", "--output", str(tmp_path)]
    assert benchmark.main([*argv, "--repeats", "2"]) == 0
    assert "never got there" not in capsys.readouterr().out
    assert benchmark.main([*argv, "--repeats", "3"]) == 1
    assert "trl, micro-batch 16, generate: a run never got there" in capsys.readouterr().out
    report = json.loads((tmp_path / "benchmark_goal.json").read_text())
    assert report["agreement"] == {} and len(report["medians"]) == 4


@pytest.mark.parametrize(("name", "kept"), [("rloo", 32), ("sft", 32), ("dpo", 32), ("even", 32)])
def test_every_update_is_of_as_many_completions(name: str, kept: int) -> None:
    for work in benchmark.WORKS[name].values():
        samples = work.rollout()
        assert len(samples) == kept and max(work.lengths) <= 512
    assert name != "even" or len(set(benchmark.WORKS[name]["full"].lengths)) == 1
    if name == "dpo":
        samples = benchmark.WORKS[name]["full"].rollout()
        assert [s["reward"] for s in samples] == [1, 0] * 16
        assert all(a["prompt_ids"] == b["prompt_ids"] for a, b in zip(samples[::2], samples[1::2], strict=True))


def test_losses_near_zero_are_compared_as_if_larger() -> None:
    alike = contest.agreement([{"loss": 1e-9, "grad_norm": 1.0}, {"loss": -1e-9, "grad_norm": 1.002}])
    assert alike["loss"] == pytest.approx(2e-7) and alike["grad_norm"] == pytest.approx(2e-3)
    assert not contest.alike(alike, TINY) and contest.alike({"loss": 1e-5, "grad_norm": 1e-6, "tokens": 0.02}, TINY)
    assert not contest.alike({"loss": 2e-5}, TINY) and not contest.alike({"grad_norm": 2e-6}, TINY)
    of_sequences = {"loss": 1e-5, "grad_norm": 9e-6}
    assert contest.alike(of_sequences, replace(TINY, algorithm="dpo")) and not contest.alike(of_sequences, TINY)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "sft", "dpo"])
def test_both_sides_compute_the_same(tmp_path: Path, algorithm: str) -> None:
    work = benchmark.WORKS["update" if algorithm == "grpo" else algorithm]["tiny"]
    prepare(tmp_path, work)
    smaller = Setting("ours", checkpointing=True, token_budget=48)  # more rows, with more of the prompts
    runs = [ours.update(tmp_path, work, work.rollout(), how) for how in (OURS, smaller)]
    assert (runs[1]["row_tokens"] > runs[0]["row_tokens"]) == (work.generations > 1)
    padding_free = [Setting("trl", 8, padding_free=True)] if algorithm == "sft" else []
    runs += [trl_updates.update(tmp_path, work, work.rollout(), how) for how in (Setting("trl", 8), *padding_free)]
    assert runs[0]["grad_norm"] > 1e-3 and contest.alike(contest.agreement(runs), work)
    assert algorithm == "rloo" or abs(runs[0]["loss"]) > 1e-5  # RLOO's advantages add up to nothing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ratio", [True, False])
def test_the_kl_of_both_sides_has_one_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: bool) -> None:
    """With a KL large enough to see: TRL's without its ratio is another one, though its value is the same."""
    work = replace(TINY, hidden=128, intermediate=256, layers=2, kl=2.0)
    prepare(tmp_path, work)
    options = trl_updates.grpo_options(work) | ({} if ratio else {"use_bias_correction_kl": False})
    monkeypatch.setattr(trl_updates, "grpo_options", lambda _: options)
    runs = [
        ours.update(tmp_path, work, work.rollout()),
        trl_updates.update(tmp_path, work, work.rollout(), Setting("trl", 8)),
    ]
    differs = contest.agreement(runs)
    assert differs["loss"] < 1e-5
    assert differs["grad_norm"] < 1e-6 if ratio else differs["grad_norm"] > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_whole_steps_of_both_sides(tmp_path: Path) -> None:
    work = benchmark.WORKS["step"]["tiny"]
    prepare(tmp_path, work)
    runs = [ours.step(tmp_path, work, Setting("ours", engine="hf"))]
    runs.append(trl_engines.step(tmp_path, work, Setting("trl", 32, engine="generate")))
    assert contest.alike(contest.agreement(runs), work) and runs[0]["engine"] == "HFEngine"
    assert runs[0]["tokens"] == pytest.approx(work.prompts * work.generations * 8 * 4, rel=0.03)
    assert all(run["seconds"] > 0 and run["peak_mib"] >= run["baseline_mib"] for run in runs)
    assert ours.refresh(tmp_path, work, Setting("ours", engine="hf"))["seconds"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_sides_learn_the_shipped_task_from_the_same_prompts(tmp_path: Path) -> None:
    work = benchmark.GOALS["goal"]["tiny"]
    time_to_reward.prepare(tmp_path, work)
    seen = [run(tmp_path, work, Setting(side, 16, engine=engine)) for run, side, engine in (
        (ours.reach, "ours", "hf"), (trl_engines.reach, "trl", "generate"))]  # fmt: skip
    for run in seen:
        assert run["reached"] and run["steps"] == 2 and run["seconds"] > 0
        ((step, reward),) = run["held_out"]
        assert step == 2 and 0 <= reward <= 1


def test_the_race_counts_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evidence.speed.workloads.time.perf_counter", lambda: now[0])
    now, rewards = [0.0], iter([0.5, 0.95])
    meter = Meter()
    meter.start()
    course = time_to_reward.Course(time_to_reward.Goal(every=2), meter)

    def judge() -> float:
        now[0] += 100
        return next(rewards)

    ends = []
    for _ in range(4):
        now[0] += 3
        ends.append(course.step(judge))
    monkeypatch.setenv(time_to_reward.STARTED, "1000")
    monkeypatch.setattr("evidence.speed.time_to_reward.time.time", lambda: 1000 + now[0])
    assert ends == [False, False, False, True] and course.run()["seconds"] == 12
    assert course.run()["from_start_seconds"] == 12, "the judge's seconds count for nobody"
    assert course.run()["held_out"] == [(2, 0.5), (4, 0.95)] and not course.run()["gave_up"]


def test_a_rival_gives_up_after_so_many_times_our_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evidence.speed.workloads.time.perf_counter", lambda: now[0])
    race = contest.Contest("reach", time_to_reward.Goal(every=9, patience=2.5), ())
    work = contest.with_patience(race, {"seconds": 4.0}).work
    assert isinstance(work, time_to_reward.Goal) and work.limit == 10
    assert contest.with_patience(replace(race, work=TINY), {"seconds": 4.0}).work is TINY
    now, meter = [0.0], Meter()
    meter.start()
    course, ends = time_to_reward.Course(work, meter), list[bool]()
    for _ in range(4):
        now[0] += 3
        ends.append(course.step(lambda: 0.5))
    assert ends == [False, False, False, True] and course.run()["gave_up"] and not course.run()["reached"]
    assert not contest.failed(course.run()) and contest.failed({"reached": False, "gave_up": False})


def test_laps_and_their_medians() -> None:
    laps = [{"seconds": s, "cpu_seconds": 2.0 * s} for s in (1.0, 9.0, 2.0)]
    assert typical(laps) == {"seconds": 2.0, "cpu_seconds": 4.0}
    assert Workload(sigma=0.0, longest=100).lengths == [100] * 32
