"""A reward model made here: its scores are those of the classifier, one by one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from nanorlhf.config.training import TrainConfig
from nanorlhf.rewards import model as module
from nanorlhf.scoring.reward import find_rewards
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.types import Prompt, Sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained("nanorlhf/models/adder")
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = Qwen2Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape)
    config.num_labels = 1
    Qwen2ForSequenceClassification(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def test_scores_are_the_classifiers_whatever_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [{"role": "user", "content": "1+1="}]
    batch = [Sample(Prompt(0, [1], prompt, {}), [1], [0.0], True, text) for text in ("2", "a longer answer", "12", "")]  # type: ignore[arg-type]
    monkeypatch.setattr(module, "TOKENS", 64)  # so that there are several batches
    Scorer(find_rewards(f"model:{folder}"), TrainConfig()).score(batch)
    judge = module.Classifier(str(folder))
    classifier, tokenizer = judge.load(), judge.tokenizer
    assert tokenizer is not None
    for s in batch:
        chat = [*prompt, {"role": "assistant", "content": s.text}]
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert s.rewards["model"] == pytest.approx(classifier(**ids).logits.item(), abs=1e-5)
    assert len({round(s.reward or 0, 6) for s in batch}) == 4


def test_a_tokenizer_without_padding_pads_with_its_end(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    judge = module.Classifier(str(bare))
    classifier = judge.load()
    assert judge.tokenizer.pad_token_id == classifier.config.pad_token_id
    texts = ["2", "a longer answer"]
    scores = module.classify(classifier, judge.tokenizer, ["1+1="] * 2, texts)
    alone = [module.classify(classifier, judge.tokenizer, ["1+1="], [text])[0] for text in texts]
    assert scores == pytest.approx(alone, abs=1e-5)
