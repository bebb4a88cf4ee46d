"""Evaluation of runs, checkpoints and models: figures that can be counted again from the completions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest

from nanorlhf.config import names
from nanorlhf.config.names import shipped_model
from nanorlhf.data import templates
from nanorlhf.grpo import GRPOTrainer
from nanorlhf.scripts import evaluate
from nanorlhf.scripts.evaluate import about, answer_of, beside, main
from nanorlhf.scripts.resumable import Kept
from nanorlhf.scripts.statistics import pass_at
from nanorlhf.system import gpu_memory
from tests.test_trainer import config


def test_a_run_is_evaluated_with_its_own_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    GRPOTrainer(args=config(tmp_path / "run", max_steps=2, eval_prompts=4)).train()
    output, held = tmp_path / "figures.json", list[float]()
    monkeypatch.setattr(gpu_memory, "hold", held.append)
    words = [str(tmp_path / "run"), "--samples", "4", "--eval_prompts", "30", "--gpu_memory_gib", "7"]
    assert main([*words, "--output", str(output)]) == 0
    assert held == [7]
    assert "pass@4" in capsys.readouterr().out
    figures = json.loads(output.read_text())
    rows = [json.loads(line) for line in (tmp_path / "figures.samples.jsonl").read_text().splitlines()]
    greedy, sampled = ([row for row in rows if row["greedy"] is kind] for kind in (True, False))
    assert (figures["prompts"], len(greedy), len(sampled)) == (30, 30, 120)
    assert figures["greedy passes"]["mean"] == fmean(row["reward"] for row in greedy)
    groups = [[row["reward"] == 1 for row in sampled[i : i + 4]] for i in range(0, 120, 4)]
    assert figures["avg@4"]["mean"] == pytest.approx(fmean(row["reward"] for row in sampled))
    assert figures["pass@2"]["mean"] == pytest.approx(fmean(pass_at(2, group) for group in groups))
    assert figures["pass@4"]["mean"] == fmean(float(any(group)) for group in groups)
    assert figures["pass@4"]["mean"] >= figures["majority@4"]["mean"]


def test_an_evaluation_that_was_cut_off_goes_on_where_the_same_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK", 20)
    (tmp_path / "model").symlink_to(shipped_model("nanorlhf:adder"))
    words = [f"{tmp_path}/model", "--recipe", "grpo/recipes/tiny.yaml", "--engine", "hf", "--eval_prompts", "18"]

    def ask(name: str, samples: int = 4) -> tuple[str, str]:
        assert main([*words, "--samples", str(samples), "--output", f"{tmp_path}/{name}.json"]) == 0
        assert not (tmp_path / f"{name}.partial.jsonl").exists()
        return (tmp_path / f"{name}.json").read_text(), (tmp_path / f"{name}.samples.jsonl").read_text()

    def cut_off(name: str) -> None:
        left, add = [1, 1], Kept.add
        monkeypatch.setattr(Kept, "add", lambda kept, part: (left.pop(), add(kept, part)))
        with pytest.raises(IndexError):
            ask(name)
        monkeypatch.setattr(Kept, "add", add)
        with (tmp_path / f"{name}.partial.jsonl").open("a") as file:
            file.write('[{"index": 3, "gre')  # killed as it wrote the next part

    whole, fewer = ask("whole"), ask("fewer", samples=2)
    cut_off("cut")
    capsys.readouterr()
    assert ask("cut") == whole
    assert "2 of 5 parts were finished" in capsys.readouterr().out
    cut_off("cut")
    assert ask("cut", samples=2) == fewer
    cut_off("cut")
    (tmp_path / "model").unlink()
    shutil.copytree(shipped_model("nanorlhf:adder"), tmp_path / "model", copy_function=shutil.copyfile)
    capsys.readouterr()
    assert ask("cut") == whole
    assert "finished" not in capsys.readouterr().out, "the model's files are others"


def test_where_the_model_and_the_task_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_000002").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step_000002\n")
    (run / "checkpoints" / "step_000002" / "adapter_config.json").write_text("{}")
    options = "model_name_or_path: base\ndataset_name: d\nlearning_rate: 1.0\nprompt_column: q\ncolumns: {a: b}\n"
    (run / "config.yaml").write_text(options)
    checkpoint = str(run / "checkpoints" / "step_000002")
    task = {"model_name_or_path": "base", "dataset_name": "d", "columns": {"a": "b", "prompt": "q"}}
    assert about(str(run)) == about(checkpoint) == (task, {"adapter_name_or_path": checkpoint})
    (run / "checkpoints" / "step_000002" / "adapter_config.json").unlink()
    assert about(str(run))[1] == {"model_name_or_path": checkpoint}, "all weights were trained"
    monkeypatch.chdir(run)
    assert about("some/model") == ({}, {"model_name_or_path": "some/model"}), "whose config.yaml lies here or not"


def test_files_beside_an_output_have_its_whole_name() -> None:
    names = [beside(Path(f"evals/{name}"), ".samples.jsonl").name for name in ("t0.7", "t0.8.json")]
    assert names == ["t0.7.samples.jsonl", "t0.8.samples.jsonl"]


def test_an_adapter_is_asked_by_its_own_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    trained = GRPOTrainer(args=config(tmp_path / "run", max_steps=1, eval_steps=0))
    trained.tokenizer.chat_template = template  # as one who trains in Python may
    trained.train()
    options = {"prompt_format": "chat", "engine": "hf", "eval_prompts": "4", "samples": "1", "greedy": "false"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    seen = list[str]()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(templates, "use_template", lambda tokenizer, task: seen.append(tokenizer.chat_template))
        assert main([str(tmp_path / "run"), *words]) == 0
        monkeypatch.chdir(names.latest(tmp_path / "run") or "")  # of whose files a model by its name has none
        recipe = Path(__file__).parents[2] / "grpo" / "recipes" / "tiny.yaml"
        assert main(["nanorlhf:adder", "--recipe", str(recipe), *words]) == 0
    assert seen[0] == template != seen[1]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "give a run, a checkpoint or a model first"),
        (["nanorlhf:adder"], "no reward"),
        (["nanorlhf:adder", "--chat_template_kwargs", "{tools: [{}]}"], "tools that were given in Python"),
        (["/nowhere", "--recipe", "grpo/recipes/tiny.yaml"], "model_name_or_path='/nowhere' cannot be loaded"),
        (["nanorlhf:adder", "--recipe", "grpo/recipes/tiny.yaml,nowhere.yaml"], "there is no recipe 'nowhere.yaml'"),
        (["nanorlhf:adder", "--sample", "3"], "did you mean 'samples'"),
        (["nanorlhf:adder", "--samples", "0", "--greedy", "false"], "there must be some"),
        (["nanorlhf:adder", "--samples", "9000000000"], "samples=9000000000 cannot work: samples 9,000,000,001 x"),
    ],
)
def test_mistakes(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert why in capsys.readouterr().err


def test_what_a_completion_votes_for() -> None:
    assert answer_of("<answer> 3 </answer>, that is \\boxed{4}") == "3"
    assert answer_of("so \\boxed{x+1}, not 5") == "x+1"
    assert answer_of("1 and then 1,000.0") == "1000"
    assert answer_of("no idea") is None
