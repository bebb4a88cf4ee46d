"""A merged model answers as the adapter does, in transformers and in vLLM, and says how it was made."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanorlhf.config import names
from nanorlhf.config.names import shipped_model
from nanorlhf.engines.base import Request, Sampling
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.scripts.merge import main
from nanorlhf.scripts.model_card import USED
from tests.test_trainer import config

BASE = shipped_model("nanorlhf:adder")
ASKED = [f"<|im_start|>user\n{n}+{n + 7}=<|im_end|>\n<|im_start|>assistant\n" for n in range(10, 50, 5)]
LENGTH = 12


@dataclass(frozen=True)
class Trained:
    """A run, and what its adapter and the model below it answer in transformers."""

    run: Path
    adapter: list[list[int]]
    base: list[list[int]]


@torch.no_grad()
def answers(model: Any) -> list[list[int]]:
    """Greedy, up to the end of the answer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    found = []
    for text in ASKED:
        ids = tokenizer(text, return_tensors="pt")
        said = model.generate(**ids, do_sample=False, max_new_tokens=LENGTH, eos_token_id=tokenizer.eos_token_id)
        found.append(said[0, ids["input_ids"].shape[1] :].tolist())
    return found


def load(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run = tmp_path_factory.mktemp("merge") / "run"
    GRPOTrainer(args=config(run, max_steps=6, learning_rate=5e-3, save_steps=3, run_name="Höhe")).train()
    newest = names.latest(run)
    assert newest is not None
    found = Trained(run, answers(PeftModel.from_pretrained(load(BASE), str(newest))), answers(load(BASE)))
    differ = sum(a != b for a, b in zip(found.adapter, found.base, strict=True))
    assert differ > len(ASKED) / 2, "training changed most answers, or what follows proves nothing"
    return found


def test_transformers_says_the_same(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "not" / "yet" / "merged"
    assert main([str(trained.run), str(output)]) == 0
    assert answers(load(output)) == trained.adapter
    merged, base = (AutoTokenizer.from_pretrained(folder) for folder in (output, BASE))
    assert merged.chat_template == base.chat_template and merged.get_vocab() == base.get_vocab()
    assert not list(output.parent.glob(".*")) and not list(output.glob("adapter*"))


@pytest.mark.vllm
def test_vllm_says_the_same(trained: Trained, tmp_path: Path) -> None:
    from nanorlhf.engines.vllm import VLLMEngine

    output = tmp_path / "merged"
    assert main([str(trained.run), str(output)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(output)
    requests = [Request(i, tokenizer(text)["input_ids"], greedy=True) for i, text in enumerate(ASKED)]
    sampling = Sampling(1.0, LENGTH, (tokenizer.eos_token_id,))
    with closing(VLLMEngine(str(output), sampling, sync="merged", max_model_len=64)) as engine:
        engine.version = 0
        found = {completion.id: completion.token_ids for completion in engine.generate(requests, seed=0)}
    assert [found[i] for i in range(len(ASKED))] == trained.adapter


def test_the_template_is_that_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    GRPOTrainer(args=config(run, max_steps=1, eval_steps=0, chat_template="plain")).train()
    assert main([str(run), str(tmp_path / "merged")]) == 0
    merged, saved = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "merged", names.latest(run)))
    assert merged.chat_template == saved.chat_template != AutoTokenizer.from_pretrained(BASE).chat_template


def test_weights_are_of_the_wanted_kind(trained: Trained, tmp_path: Path) -> None:
    assert main([str(trained.run), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert main([str(trained.run), str(tmp_path / "whole")]) == 0
    half, whole = load(tmp_path / "half"), load(tmp_path / "whole")
    assert half.dtype == torch.bfloat16 and whole.dtype == load(BASE).dtype
    for a, b in zip(half.parameters(), whole.parameters(), strict=True):
        assert a.equal(b.bfloat16()), "rounded once, after the sum"


def test_a_whole_model_needs_no_merging(tmp_path: Path) -> None:
    GRPOTrainer(args=config(tmp_path / "run", max_steps=1, learning_rate=1e-3, lora="none")).train()
    assert main([str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    kept = load(names.latest(tmp_path / "run") or "").state_dict()
    assert all(weight.equal(kept[name]) for name, weight in load(tmp_path / "merged").state_dict().items())
    assert not load(BASE).lm_head.weight.equal(kept["lm_head.weight"])


def test_a_whole_model_gets_the_dtype_of_the_files_it_began_with(tmp_path: Path) -> None:
    load(BASE).bfloat16().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "half")
    options: dict[str, Any] = {"model_name_or_path": str(tmp_path / "half"), "lora": "none", "max_steps": 1}
    GRPOTrainer(args=config(tmp_path / "run", **options)).train()
    assert load(names.latest(tmp_path / "run") or "").dtype == torch.float32
    assert main([str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    assert load(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize(("part", "step"), [("", 6), ("checkpoints/step_000003", 3)])
def test_card_holds_recipe_and_results(trained: Trained, tmp_path: Path, part: str, step: int) -> None:
    assert main([str(trained.run / part), str(tmp_path / "merged")]) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    facts = yaml.safe_load(head)
    (measured,) = facts.pop("model-index")[0]["results"]
    kind = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["nanorlhf", "grpo"]}
    assert facts == kind, "no base and no dataset that the hub could know"
    assert text.startswith(
        f"# Höhe\n\nnanorlhf:adder, trained by nanorlhf (grpo) for {step} steps; what it learned is in"
    )
    assert f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})" in text
    picture = (tmp_path / "merged" / "learning_curve.png").read_bytes()
    assert "(learning_curve.png)" in text and picture.startswith(b"\x89PNG")
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    options = yaml.safe_load((trained.run / "config.yaml").read_text())
    assert recipe.items() <= options.items() and "output_dir" not in recipe
    used = {"learning_rate": 5e-3, "temperature": 1.0, "seed": 0, "num_generations": 4, "max_steps": 6, "kl_coef": 0.0}
    assert used.items() <= recipe.items(), "also where they are the usual ones"
    usual = GRPOConfig().to_dict()
    assert {name for name in recipe if recipe[name] == usual[name]} <= set(USED), "and no others that are"
    rows = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    held_out = {row["step"]: row["eval/reward"] for row in rows if "eval/reward" in row and row["step"] <= step}
    last = max(held_out)
    assert f"| eval/reward | {held_out[0]:.4g} (step 0) | {held_out[last]:.4g} (step {last}) |" in text
    assert measured["metrics"] == [{"type": "reward", "value": round(held_out[last], 4)}]
    assert measured["dataset"] == {"name": "arithmetic", "type": "custom", "split": "test"}
    assert f", torch {torch.__version__}, " in text


def test_mistakes(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    torn = tmp_path / "torn"
    torn.mkdir()
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        (torn / name).write_bytes((trained.run / name).read_bytes())
    damaged = torn / "checkpoints" / "step_000006"
    damaged.mkdir(parents=True)
    for file in (trained.run / "checkpoints" / "step_000006").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:1000])
    for run, output, words in [
        (tmp_path, "out", "no config.yaml"),
        (trained.run, "file", "exists; choose another folder"),
        (trained.run, "file/out", "cannot be written: "),
        (damaged, "out", "is damaged"),
    ]:
        assert main([str(run), str(tmp_path / output)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_a_model_made_in_python_is_merged_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = config(tmp_path / "run", max_steps=1, model_name_or_path="")
    GRPOTrainer(load(BASE), args=args, processing_class=AutoTokenizer.from_pretrained(BASE)).train()
    capsys.readouterr()
    assert main([str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "a model made in Python" in error and error.count("\n") == 1
