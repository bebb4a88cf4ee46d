"""Every recipe resolves, and those of real tasks train: on rows of the dataset's schema, with a small model."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.cli import parse
from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from tests.data.test_row_schemas import COUNTDOWN, GSM8K, HH, MATH_500, META, TLDR

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [(name, path.stem) for name in ALGORITHMS for path in sorted((ROOT / name / "recipes").glob("*.yaml"))]
ROWS: dict[str, dict[str, Any]] = {
    "openai/gsm8k": GSM8K,
    "meta-math/MetaMathQA": META,
    "HuggingFaceH4/MATH-500": MATH_500,
    "Jiayi-Pan/Countdown-Tasks-3to4": COUNTDOWN,
    "Anthropic/hh-rlhf": HH,
    "trl-lib/tldr": TLDR,
}
BEGINNINGS = {  # what a prompt of each dataset (or recipe) must hold, as the model sees it
    "r1_zero": "6 times 7?\nReason step by step, and put the final answer into \\boxed{}.\nAssistant: <think>",
    "openai/gsm8k": "<|im_start|>user\nNatalia sold 48 clips. How many?",
    "meta-math/MetaMathQA": "6 times 7?\nReason step by step, and put the final answer into \\boxed{}.<|im_end|>",
    "Jiayi-Pan/Countdown-Tasks-3to4": "User: Using each of the numbers [44, 19, 35] exactly once",
    "Anthropic/hh-rlhf": "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello.\n\nYes?<|im_end|>\n",
    "trl-lib/tldr": "SUBREDDIT: r/cats\n\nPOST: A long one.\n\nTL;DR:",
}
LISTED = (ROOT / "docs/runs.md").read_text().partition("## Every metric")[2].partition("\n## ")[0]
NAMES = [re.sub("NAME|PHASE|METRIC", "[a-z_]+", name) for name in re.findall("`([a-zA-Z0-9_/]+)`", LISTED)]
METRICS = re.compile("|".join(NAMES))


def options_of(name: str, recipe: str) -> dict[str, Any]:
    """The options that a recipe sets."""
    return yaml.safe_load((ROOT / name / "recipes" / f"{recipe}.yaml").read_text())


REAL = [(name, recipe) for name, recipe in RECIPES if "/" in options_of(name, recipe).get("dataset_name", "")]


def resolved(name: str, recipe: str) -> TrainConfig:
    package = importlib.import_module(f"nanorlhf.{name}")
    (config_class,) = (getattr(package, c) for c in package.__all__ if c.endswith("Config"))
    return parse(config_class, name, ROOT / name / "recipes", ["--recipe", recipe])[1]


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_every_recipe_resolves(name: str, recipe: str) -> None:
    config = resolved(name, recipe).to_dict()
    said = {k: v for k, v in options_of(name, recipe).items() if k in config}
    assert said and {k: config[k] for k in said} == said


def test_there_are_recipes_for_real_tasks() -> None:
    assert {recipe for _, recipe in REAL} >= {"gsm8k", "math", "countdown", "hh_rlhf", "tldr"}
    assert {name for name, _ in REAL} >= {"grpo", "ppo", "rloo", "sft", "dpo", "online_dpo"}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a longer context than the shipped one's, a classifier, and a file of rows for each dataset."""
    where = tmp_path_factory.mktemp("recipes")
    shutil.copytree(shipped_model("nanorlhf:adder"), where / "model")
    config = json.loads((where / "model" / "config.json").read_text())
    (where / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    tokenizer = AutoTokenizer.from_pretrained(where / "model")
    shape = Qwen2Config(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, hidden_size=32, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    shape.num_labels = 1
    Qwen2ForSequenceClassification(shape).save_pretrained(where / "classifier")
    tokenizer.save_pretrained(where / "classifier")
    for dataset, row in ROWS.items():
        (where / f"{Path(dataset).name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    return where


@pytest.mark.parametrize(("name", "recipe"), REAL)
def test_recipes_of_real_tasks_train(
    name: str, recipe: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
    said, config = options_of(name, recipe), resolved(name, recipe)
    argv = ["--recipe", recipe, "--engine", "hf", "--device", "cpu", "--output_dir", str(tmp_path / "run")]
    replaced: dict[str, Any] = {"model_name_or_path": str(here / "model"), "dataset_train_split": "train[:3]"}
    replaced |= {"dataset_name": str(here / f"{Path(said['dataset_name']).name}.jsonl"), "dataset_config": None}
    replaced |= {"dataset_test_split": "train[3:]", "max_prompt_length": 1024, "max_completion_length": 8}
    replaced |= {"prompts_per_step": 2, "max_steps": 2, "eval_prompts": 1, "eval_steps": 0, "reward_workers": 0}
    if config.dataset_test_name:
        replaced["dataset_test_name"] = str(here / f"{Path(config.dataset_test_name).name}.jsonl")
    if any(reward.startswith("model:") for reward in config.rewards):
        replaced["reward_funcs"] = f"model:{here / 'classifier'}"
    if name not in ("sft", "dpo", "reward_model"):
        replaced["num_generations"] = min(2, getattr(config, "num_generations", 2))
    if name == "ppo":
        replaced["value_init_prompts"] = 5
    argv += [word for k, v in replaced.items() for word in (f"--{k}", "null" if v is None else str(v))]
    assert importlib.import_module(f"nanorlhf.{name}.__main__").main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [m for row in rows for m in row if not METRICS.fullmatch(m)] == [], "docs/runs.md lists every metric"
    assert all(math.isfinite(row["loss"]) for row in rows[1:])
    assert all(row["eval/reward" if config.rewards else "eval/loss"] is not None for row in (rows[0], rows[-1]))
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(math.isfinite(sample["reward"]) for sample in samples)  # so no answer is missing
    shown = capsys.readouterr().out
    assert BEGINNINGS.get(recipe, BEGINNINGS[said["dataset_name"]]) in shown.replace("\\n", "\n").replace("\\\\", "\\")
    if config.chat_template == "r1_zero":
        assert all(sample["completion"].startswith("<think>\n") for sample in samples)
