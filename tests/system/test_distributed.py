"""Several processes, by gloo on a CPU: the same updates as one, and one end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nanorlhf.__main__ import main
from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import RunError, UsageError
from nanorlhf.learning.optimizer import Optimizer
from nanorlhf.learning.passes import Passes
from nanorlhf.learning.shares import divided, idle
from nanorlhf.records.directory import read_lines
from nanorlhf.system import distributed
from nanorlhf.system.distributed import World, join, world
from nanorlhf.system.terminal import signature, speaks
from tests.samples import rollout, sample

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = ["--recipe", "tiny", "--engine", "hf", "--eval_prompts", "16", "--eval_steps", "0"]
COUNTED = ("tokens/rollout", "tokens/trained", "reward/mean", "reward/unscored", "samples/dropped_fraction")
Lines = dict[str, list[str]]  # command lines by the name of their run


def launch(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """So many processes of a module."""
    line = [*LAUNCH, "--nproc_per_node", str(processes), "-m", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=400, env=ENVIRONMENT)


def launch_all(processes: int, lines: Lines, folder: Path) -> None:
    """Several runs of so many processes, which must end well."""
    folder.mkdir()
    (folder / "lines.json").write_text(json.dumps(placed(lines, folder)))
    ended = launch(processes, "tests.one_of_several", str(folder / "lines.json"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("run directory") == len(lines), "one speaks for all"


def placed(lines: Lines, folder: Path) -> list[list[str]]:
    return [[*words, "--output_dir", str(folder / name)] for name, words in lines.items()]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_lines(folder / "metrics.jsonl") if "time/step" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same updates by one and two processes, in folders 1 and 2."""
    folder = tmp_path_factory.mktemp("team")
    kept = folder / "kept"
    assert main(["grpo", *TINY, "--max_steps", "6", "--prompts_per_step", "8", "--output_dir", str(kept)]) == 0
    unseen = folder / "unseen.yaml"
    unseen.write_text("dataset_test_split: null\neval_steps: 0\n")  # nobody generates
    fed = ["--prompts_per_step", "8", "--rollouts_from", str(kept), "--learning_rate", "2e-4"]
    often, small = (
        ["--updates_per_step", "2", "--save_steps", "3", "--save_total_limit", "9"],
        ["--token_budget", "256"],
    )
    kl = ["--kl_coef", "0.01"]
    lines: Lines = {
        "grpo": ["grpo", *TINY, *fed, "--max_steps", "6", "--whiten_advantages", "on", *kl, *often],
        "gspo": ["grpo", *TINY, *fed, "--max_steps", "3", "--policy_loss", "gspo", "--norm", "sequence"],
        "everything": ["grpo", *TINY, *fed, "--max_steps", "3", "--lora", "none"],
        "dpo": ["dpo", *TINY, "--max_steps", "3"],
        "sharded": ["grpo", "--recipe", f"tiny,{unseen}", *fed, "--max_steps", "4", *kl, *small],
    }
    for words in placed(lines, folder / "1"):
        assert main(words) == 0
    lines["sharded"] += ["--shard_base"]
    own: Lines = {"ppo": ["ppo", *TINY, "--max_steps", "2", "--value_init_prompts", "40"]}
    launch_all(2, lines | own, folder / "2")
    return folder


@pytest.mark.slow
@pytest.mark.evidence
def test_four_processes_learn_what_one_does(runs: Path) -> None:
    *words, _, folder = json.loads((runs / "2" / "lines.json").read_text())[0]
    launch_all(4, {Path(folder).name: words}, runs / "4")
    check_alike(runs, "grpo", 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "gspo", "everything", "dpo", "sharded"])
def test_two_processes_learn_what_one_does(name: str, runs: Path) -> None:
    check_alike(runs, name, 2)


def check_alike(runs: Path, name: str, processes: int) -> None:
    one, several = steps_of(runs / "1" / name), steps_of(runs / str(processes) / name)
    assert len(one) == len(several) > 2
    assert several[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for a, b in zip(one, several, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4), a["step"]
        for figure in ("grad_norm", "entropy", "kl", "mismatch/mean_abs"):
            if a[figure] is not None:
                assert b[figure] == pytest.approx(a[figure], rel=1e-2, abs=1e-5), (a["step"], figure)
        assert [a.get(figure) for figure in COUNTED] == [b.get(figure) for figure in COUNTED]
    kept = [(runs / n / name / "samples.jsonl").read_text().count("\n") for n in ("1", str(processes))]
    assert kept[0] == kept[1] > 0


@pytest.mark.slow
def test_a_sharded_base_gives_the_same_adapter(runs: Path) -> None:
    adapter = "sharded/checkpoints/step_000004/adapter_model.safetensors"
    one, two = load_file(runs / "1" / adapter), load_file(runs / "2" / adapter)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_held_out_pairs_are_judged_by_all(runs: Path) -> None:
    one, two = (read_lines(runs / n / "dpo" / "metrics.jsonl")[-1] for n in ("1", "2"))
    assert two["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-3)
    assert two["eval/accuracy"] == pytest.approx(one["eval/accuracy"])


@pytest.mark.slow
def test_a_critic_is_taught_by_all(runs: Path) -> None:
    first, *learned = read_lines(runs / "2" / "ppo" / "metrics.jsonl")
    assert first["value_init/episodes"] == 40
    assert first["value_init/explained_variance_after"] > 0.2
    assert all(row["value/loss"] > 0 and row["reward/unscored"] == 0 for row in learned)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(runs: Path) -> None:
    folder = runs / "2" / "grpo"
    assert main(["grpo", "--resume", str(folder / "checkpoints" / "step_000003")]) == 0
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    for a, b in zip(steps_of(runs / "1" / "grpo"), steps_of(folder), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4), a["step"]


@pytest.mark.slow
def test_a_killed_process_ends_the_others_soon_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["grpo", *TINY, "--prompts_per_step", "8", "--max_steps", "400", "--save_steps", "2"]
    words += ["--output_dir", str(folder)]
    log = (tmp_path / "log").open("w+")
    line = [*LAUNCH, "--nproc_per_node", "2", "-m", "nanorlhf", *words]
    run = subprocess.Popen(line, stdout=log, stderr=log, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(read_lines(folder / "metrics.jsonl")) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process_of(str(folder), 1), signal.SIGKILL)
    killed = time.monotonic()
    assert run.wait(60) != 0
    assert time.monotonic() - killed < 30
    log.seek(0)
    said = log.read()
    log.close()
    assert "error (process 0): another process of this run has ended" in said
    assert f"go on with --resume {folder}" in said
    assert launch(2, "nanorlhf", "grpo", "--resume", str(folder), "--max_steps", "5").returncode == 0
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == list(range(6))
    assert len(json.loads((folder / "checkpoints" / "step_000005" / "checksums.json").read_text())) > 3


def process_of(words: str, rank: int) -> int:
    """The process of that rank whose command line has these words."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if words.encode() in command and f"\0RANK={rank}\0".encode() in environment and b"nanorlhf" in command:
            return int(entry.name)
    raise AssertionError("there is no such process")


@pytest.mark.vllm
def test_every_process_has_an_engine_of_its_own(tmp_path: Path) -> None:
    words = ["--recipe", "tiny", "--engine", "vllm", "--max_steps", "3", "--eval_prompts", "16"]
    sharded = ["--shard_base", "--prompts_per_step", "24", "--token_budget", "128", "--value_init_prompts", "30"]
    lines = {"vllm": ["grpo", *words], "sharded": ["ppo", *words, *sharded, "--kl_coef", "0.05"]}
    launch_all(2, lines, tmp_path / "2")
    for name, samples in (("vllm", 256), ("sharded", 24)):
        rows = steps_of(tmp_path / "2" / name)
        assert [row["tokens/rollout"] > samples for row in rows] == [True] * 3
        assert all(row["mismatch/mean_abs"] < 1e-5 for row in rows)
    written = read_lines(tmp_path / "2" / "vllm" / "samples.jsonl")
    assert len(written) == 3 * 256
    assert len({row["index"] for row in written}) == 3 * 32, "none is written twice"


def test_what_accelerate_would_do_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="say --shard_base"):
        join(torch.device("cpu"))


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("not a run")
    lines = [["grpo", "--lora_r", "0"], ["grpo", *TINY, "--output_dir", str(tmp_path / "full")]]
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    ended = launch(2, "tests.one_of_several", str(tmp_path / "lines.json"))
    assert ended.returncode == 1
    assert (ended.stderr.count("lora_r"), ended.stderr.count("is not empty")) == (1, 1)


def test_alone_everything_is_what_it_was() -> None:
    alone = world()
    tensor, parameter = torch.tensor([1.0, 2.0]), nn.Parameter(torch.zeros(2))
    alone.sum([tensor])
    assert tensor.tolist() == [1, 2]
    assert alone.sum_gradients([parameter], 0.5) == 0.5
    assert parameter.grad is None
    assert (alone.share([1, 2, 3]), alone.gather(7), alone.concat([1, 2]), alone.broadcast("x")) == (
        [1, 2, 3], [7], [1, 2], "x"
    )  # fmt: skip
    assert alone.first_only(lambda: 3) == 3
    assert (speaks(), signature()) == (True, "")


def test_gradients_are_summed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "BUCKET", 40)
    tensors = [torch.full((size,), float(size)) for size in (4, 6, 1, 20, 2)] + [torch.ones(3, dtype=torch.float64)]
    assert [[len(t) for t in some] for some in distributed.buckets(tensors)] == [[4, 6], [1], [20], [2], [3]]
    copied = list[int]()

    def double(collective: object, flat: torch.Tensor) -> None:  # noqa: ARG001
        copied.append(0 if any(flat.data_ptr() == t.data_ptr() for t in tensors) else flat.nbytes)
        flat.mul_(2)

    monkeypatch.setattr(distributed, "run_collective", double)
    World(size=2, device=torch.device("cpu")).sum(tensors)
    assert [t.tolist() for t in tensors] == [[2.0 * n] * n for n in (4, 6, 1, 20, 2)] + [[2.0] * 3]
    assert copied == [40, 0, 0, 0, 0], "what is alone is summed where it lies"


def test_memory_that_ends_in_a_step_of_several_processes_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(2))
    taken = Optimizer(TrainConfig(), [parameter], 1e-3, torch.device("cpu"))
    parameter.grad = torch.ones(2)
    monkeypatch.setattr(taken, "take", full)
    passes = Passes(100)
    (attempt,) = [next(passes.retries("update", 10, 100, list))]
    with attempt:
        taken.step()
    assert attempt.full, "one process tries again with shorter rows"
    monkeypatch.setattr(World, "sum_gradients", lambda self, parameters, loss: loss)
    monkeypatch.setattr("nanorlhf.learning.optimizer.world", lambda: World(size=2))
    attempt = next(passes.retries("update", 10, 100, list))
    with pytest.raises(RunError, match="where all processes must go on together"), attempt:
        taken.step()


def full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_shares_are_disjoint_and_everything() -> None:
    for size in (1, 2, 3, 5):
        parts = [World(rank, size).share(list(range(7))) for rank in range(size)]
        assert [item for part in parts for item in part] == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("together", [1, 2])
def test_work_is_divided_by_tokens(together: int) -> None:
    made = rollout([sample(prompt=4, completion=length) for length in (40, 1, 1, 30, 9, 8, 2, 2)])
    chosen = torch.tensor([True] * 6 + [True, together == 2])
    parts = divided(made, chosen, 2, together)
    assert torch.equal(parts[0] | parts[1], chosen)
    assert not (parts[0] & parts[1]).any()
    loads = [sum(made.samples[i].row_length for i in part.nonzero().flatten().tolist()) for part in parts]
    assert max(loads) / min(loads) < 1.2
    if together == 2:
        assert all(part[0::2].equal(part[1::2]) for part in parts), "a pair stays one"


def test_an_idle_row_teaches_nothing() -> None:
    row = idle(rollout([sample(completion=6), sample(completion=2)]))
    assert len(row.input_ids) == 6
    assert len(row.targets) == len(row.weights) == len(row.columns["engine_logprobs"]) == 0


def test_one_process_has_nothing_to_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", "--recipe", "tiny", "--shard_base", "--output_dir", str(tmp_path / "run")]) == 2
    assert "there is one process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
