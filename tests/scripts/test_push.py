"""Adapters and merged models reach the hub whole, with a card; the hub is a stand-in for its client."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import AutoModelForCausalLM

from nanorlhf.config.names import latest, shipped_model
from nanorlhf.grpo import GRPOTrainer
from nanorlhf.reward_model import RewardModelTrainer
from nanorlhf.scripts.push import main
from tests.reward_model.test_reward_model import config as judge_config
from tests.test_trainer import config

BASE = shipped_model("nanorlhf:adder")


@dataclass
class Hub:
    """A hub that is a folder."""

    folder: Path
    client: Any  # with the methods and the signatures of the real one

    def create(self, repo_id: str, private: bool | None, exist_ok: bool) -> RepoUrl:
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub", create_autospec(HfApi, instance=True))
    hub.client.whoami.return_value = {"name": "ada"}
    hub.client.create_repo.side_effect = hub.create
    hub.client.upload_folder.side_effect = hub.upload
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub.client)
    return hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("push") / "run"
    GRPOTrainer(args=config(run, max_steps=2, learning_rate=5e-3, save_steps=1)).train()
    return run


def loaded_as_the_card_says(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that the lines of a card give where the hub's repositories are folders."""
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec((folder / name / "README.md").read_text().split("```python\n")[1].split("```")[0], found)  # noqa: S102
    assert found["tokenizer"]("1+1=")["input_ids"]
    return found["model"]


def same_answers(one: Any, other: Any) -> bool:
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        return torch.allclose(one(ids).logits, other(ids).logits, atol=1e-4)


def test_adapter_and_merged_model_are_loaded_as_their_cards_say(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(run), "ada/adder", "--base", "org/base", "--private"]) == 0
    assert main([str(run), "whole", "--merged"]) == 0
    said = capsys.readouterr().out
    for name in ("adder", "whole"):
        assert f"pushed to https://huggingface.co/ada/{name}\n" in said
    private = [call.kwargs["private"] for call in hub.client.create_repo.call_args_list]
    assert private == [True, None], "else the account's own setting"
    assert hub.client.upload_folder.call_args.kwargs["commit_message"] == "run, step 2, by nanorlhf"
    adapter, whole = ({p.name for p in (hub.folder / "ada" / name).iterdir()} for name in ("adder", "whole"))
    beside = {"README.md", "learning_curve.png", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert adapter == beside | {"adapter_config.json", "adapter_model.safetensors"}, (
        "and nothing of the trainer's state"
    )
    assert whole == beside | {"config.json", "generation_config.json", "model.safetensors"}
    head = yaml.safe_load((hub.folder / "ada/adder/README.md").read_text().split("---\n")[1])
    assert head["base_model"] == "org/base" and head["library_name"] == "peft"
    shutil.copytree(BASE, hub.folder / "org" / "base")
    merged = loaded_as_the_card_says(hub.folder, "ada/whole", monkeypatch)
    assert same_answers(loaded_as_the_card_says(hub.folder, "ada/adder", monkeypatch), merged)
    assert not same_answers(AutoModelForCausalLM.from_pretrained(BASE), merged)


def test_a_checkpoint_has_the_card_of_its_step(hub: Hub, run: Path) -> None:
    assert main([str(run / "checkpoints" / "step_000001"), "ada/first", "--base", "org/base"]) == 0
    card = (hub.folder / "ada/first/README.md").read_text()
    assert "trained by nanorlhf (grpo) for 1 steps" in card and "(step 2)" not in card


def test_a_reward_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "judge"
    RewardModelTrainer(args=judge_config(run, max_steps=1, learning_rate=1e-3)).train()
    assert main([str(run), "ada/judge", "--base", "org/base"]) == 0
    assert main([str(run), "ada/whole", "--merged"]) == 0
    shutil.copytree(BASE, hub.folder / "org" / "base")
    config = json.loads((hub.folder / "ada/judge/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["base_model_name_or_path"] == "org/base"
    assert loaded_as_the_card_says(hub.folder, "ada/whole", monkeypatch).score.weight.any()
    shutil.rmtree(run / "model")
    assert main([str(run), "ada/whole", "--merged"]) == 2


def test_mistakes_are_said_before_the_hub_is_asked(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "run" / "checkpoints" / "step_000002"
    shutil.copytree(run, tmp_path / "run")
    (damaged / "adapter_model.safetensors").write_bytes(b"torn")
    for words, why in [
        ([str(tmp_path), "ada/x"], "there is no config.yaml"),
        ([str(damaged), "ada/x"], "is damaged"),
        ([str(run), "ada/x"], "'nanorlhf:adder' is on this machine only"),
        ([str(run), "a b"], "no such names as 'a b'"),
        ([str(run), "ada/x", "--base", "org/base", "--dtype", "bfloat16"], "--merged"),
    ]:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert why in error and error.startswith("push: error: ") and error.count("\n") == 1, error
    assert not hub.client.method_calls


def test_a_hub_that_refuses_is_one_line(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.client.whoami.side_effect = LocalTokenNotFoundError("no token found: hf auth login\nand more")
    assert main([str(run), "ada/x", "--merged"]) == 1
    assert capsys.readouterr().err == "push: error: 'ada/x' cannot be pushed: no token found: hf auth login\n"
    hub.client.create_repo.assert_not_called()
    hub.client.whoami.side_effect = None
    hub.client.upload_folder.side_effect = OSError("403 Forbidden")
    assert main([str(run), "ada/x", "--base", "org/base"]) == 1
    assert "403 Forbidden" in capsys.readouterr().err
    assert latest(run) is not None
