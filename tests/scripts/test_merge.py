"""A merged model answers as the adapter does, in transformers and in vLLM, and says how it was made."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanorlhf.engines.base import Request, Sampling
from nanorlhf.grpo import GRPOTrainer
from nanorlhf.packing import pack
from nanorlhf.scripts.merge import main
from nanorlhf.types import Prompt, Sample
from tests.samples import rollout
from tests.test_trainer import config

ASKED = [f"<|im_start|>user\n{n}+{n + 7}=<|im_end|>\n<|im_start|>assistant\n" for n in range(10, 50, 5)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[GRPOTrainer, Path]:
    run = tmp_path_factory.mktemp("merge") / "run"
    trainer = GRPOTrainer(args=config(run, max_steps=3, learning_rate=5e-3))
    trainer.train()
    return trainer, run


@torch.no_grad()
def greedy(trainer: GRPOTrainer, ids: list[int], count: int) -> list[int]:
    """What the policy itself would say, token by token, through its own packed path."""
    said: list[int] = []
    for _ in range(count):
        sample = Sample(Prompt(0, [*ids, *said], "", {}), [0], [0.0], True, "")
        (batch,) = pack(rollout([sample]), torch.tensor([True]), torch.ones(1), 4096)
        head: Any = trainer.policy.base.get_output_embeddings()
        said.append(int(head(trainer.policy.hidden(batch)[batch.predict_at]).argmax()))
    return said


def test_transformers_says_the_same(trained: tuple[GRPOTrainer, Path]) -> None:
    trainer, run = trained
    output = run.parent / "merged"
    assert main([str(run), str(output)]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(output)
    tokenizer: Any = AutoTokenizer.from_pretrained(output)
    base: Any = AutoModelForCausalLM.from_pretrained("nanorlhf/models/adder")
    differs = 0
    for text in ASKED:
        ids = tokenizer(text, return_tensors="pt")
        said = model.generate(**ids, do_sample=False, max_new_tokens=6)[0, ids["input_ids"].shape[1] :].tolist()
        assert said == greedy(trainer, ids["input_ids"][0].tolist(), len(said))
        differs += (
            said != base.generate(**ids, do_sample=False, max_new_tokens=6)[0, ids["input_ids"].shape[1] :].tolist()
        )
    assert differs, "the adapter changed something, or this proves nothing"
    card = (output / "README.md").read_text()
    assert "learning_rate: 0.005" in card and "| eval/reward |" in card


@pytest.mark.vllm
def test_vllm_says_the_same(trained: tuple[GRPOTrainer, Path]) -> None:
    from nanorlhf.engines.vllm import VLLMEngine

    trainer, run = trained
    output = run.parent / "served"
    assert main([str(run), str(output)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(output)
    end = tokenizer.eos_token_id
    requests = [Request(i, tokenizer(text)["input_ids"], greedy=True) for i, text in enumerate(ASKED)]
    with closing(VLLMEngine(str(output), Sampling(1.0, 6, (end,)), sync="merged", max_model_len=64)) as engine:
        engine.version = 0
        for completion in engine.generate(requests, seed=0):
            said = completion.token_ids
            assert said == greedy(trainer, requests[completion.id].prompt_ids, len(said))


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "no config.yaml" in capsys.readouterr().err
