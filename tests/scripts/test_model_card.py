"""A card says how a model was made and how to load it, and nothing that is secret or that the hub cannot know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nanorlhf.ppo import PPOConfig
from nanorlhf.records.directory import RunRecord
from nanorlhf.scripts.model_card import USED, Saved, card, hub_name

ROWS = [{"step": 0, "eval/reward": 0.25}, {"step": 5, "time/step": 2.0, "eval/reward": 0.75, "kl": 0.125}]


def text(
    folder: Path, adapter: bool = False, base: str | None = None, by: str = "ppo", rows: Any = ROWS, **options: Any
) -> str:
    """The card of a run that never was."""
    told = PPOConfig().to_dict() | {"run_name": None} | options
    record = RunRecord(folder, by, told, {"machine": "a desk", "versions": {"torch": "9.9"}}, rows)
    return card(Saved(record, 5, adapter, "me/mine", base), rows)


def head(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def recipe(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("```yaml\n")[1].split("```", maxsplit=1)[0])


def test_a_card_knows_what_is_usual_for_whom(tmp_path: Path) -> None:
    told = recipe(text(tmp_path, by="mine", algorithm="mine.py:Mine", learning_rate=3e-4))
    assert told.keys() - USED == {"algorithm"} and told["learning_rate"] == 3e-4
    assert told["kl_coef"] == PPOConfig().kl_coef > 0
    older = recipe(text(tmp_path, gone=1))
    assert older["gone"] == 1 and older.keys() - USED == {"gone"}, "an option of an earlier version, and nothing usual"


def test_results_and_cost(tmp_path: Path) -> None:
    told = text(tmp_path)
    assert (
        "| eval/reward | 0.25 (step 0) | 0.75 (step 5) |" in told and "| kl | 0.125 (step 5) | 0.125 (step 5) |" in told
    )
    assert "\n2 s of training, a desk, torch 9.9.\n" in told and "learning_curve" not in told


def test_a_recipe_says_what_was_made_in_python(tmp_path: Path) -> None:
    named: dict[str, Any] = {"model_name_or_path": "org/base", "dataset_name": "arithmetic"}
    failed = [*ROWS, {"step": 5, "reward/mine/failed": 0.0, "reward/environment/failed": 0.0}]
    assert "`nanorlhf ppo --recipe recipe.yaml` runs this file" in text(tmp_path, rows=ROWS, **named)
    assert "`nanorlhf ppo --recipe" in text(tmp_path, rows=failed, reward_funcs="mine.py:mine", **named)
    assert "Made in Python: the reward mine.\n" in text(tmp_path, rows=failed, **named)
    assert "Made in Python: the model, the data.\n" in text(tmp_path)


@pytest.mark.parametrize(
    ("by", "adapter", "line"),
    [
        ("ppo", True, "AutoPeftModelForCausalLM"),
        ("ppo", False, "AutoModelForCausalLM"),
        ("reward_model", True, "AutoPeftModelForSequenceClassification"),
        ("reward_model", False, "AutoModelForSequenceClassification"),
    ],
)
def test_the_right_class_loads_it(tmp_path: Path, by: str, adapter: bool, line: str) -> None:
    told = text(tmp_path, adapter, "org/base", by)
    assert f"model = {line}.from_pretrained('me/mine')" in told
    assert f"from {'peft' if adapter else 'transformers'} import {line}" in told
    facts = head(told)
    assert facts["library_name"] == ("peft" if adapter else "transformers") and facts["base_model"] == "org/base"
    assert facts["pipeline_tag"] == ("text-classification" if by == "reward_model" else "text-generation")
    assert ("lora" in facts["tags"]) is adapter


def test_a_dataset_is_named_where_the_hub_can_have_it(tmp_path: Path) -> None:
    for name, known in [("openai/gsm8k", True), ("arithmetic", False), ("mine.py:rows", False), (str(tmp_path), False)]:
        facts = head(text(tmp_path, dataset_name=name))
        assert facts.get("datasets") == (name if known else None)
        assert facts["model-index"][0]["results"][0]["dataset"]["type"] == (name if known else "custom")


def test_which_names_the_hub_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    named = {name: hub_name(name) for name in ("org/base", "gpt2", "here/model", "nanorlhf:adder", "/gone/model", "")}
    assert [name for name, found in named.items() if found] == ["org/base", "gpt2"]


def test_a_key_in_an_option_is_left_out(tmp_path: Path) -> None:
    told = text(tmp_path, reward_options={"judge": {"api_key": "sk-1", "max_tokens": 9, "model": "m"}})
    assert recipe(told)["reward_options"] == {"judge": {"api_key": "(left out)", "max_tokens": 9, "model": "m"}}
    assert "sk-1" not in told
