"""The reward model: its loss by hand, scores and gradients of transformers, what it saves, learning, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from nanorlhf.config.names import shipped_model
from nanorlhf.data.row_schemas import UnfitError
from nanorlhf.data.row_to_prompt import ReadRow
from nanorlhf.data.templates import conversation_ids
from nanorlhf.dpo import DPOConfig, DPOTrainer
from nanorlhf.errors import UsageError
from nanorlhf.learning.packing import pack
from nanorlhf.records.metrics import Averages, Clock
from nanorlhf.reward_model import RewardModel, RewardModelConfig, RewardModelTrainer
from nanorlhf.reward_model.__main__ import main
from nanorlhf.reward_model.algorithm import by_length
from nanorlhf.reward_model.answers import better_and_worse
from nanorlhf.scoring.reward import find_rewards
from nanorlhf.scripts import merge
from tests.dpo.test_dpo import sigmoid
from tests.samples import batches, rollout, said, sample, whole
from tests.sft.test_sft import small, take
from tests.test_trainer import assert_same_outcome

TEXTS = [
    {"prompt": "One and one is", "chosen": " two, of course.", "rejected": " three."},
    {"prompt": "The sum of 4 and 5 is", "chosen": " 9", "rejected": " not known to me."},
]


def config(run: Path, **options: Any) -> RewardModelConfig:
    changes = {"dataset_test_split": None} | options
    return RewardModelConfig(**{k: v for k, v in small(run, changes).items() if k != "engine"})


def disturb(trainer: RewardModelTrainer) -> None:
    """Weights as if something had been learned."""
    noise = torch.Generator().manual_seed(0)
    for p in trainer.policy.trainable.values():
        p.data += 0.05 * torch.randn(p.shape, generator=noise)


def test_loss_by_hand() -> None:
    """-log sigmoid of .9 - .2, and of -.5 - .1; only the last token of each answer has a score."""
    step = rollout([sample(2, n, seed=i) for i, n in enumerate((3, 2, 1, 2))], group_size=2)
    step.rewards = torch.tensor([1.0, 0.0] * 2)
    algorithm = RewardModel(RewardModelConfig())
    step.columns["advantages"] = algorithm.credit(step).advantages
    (batch,) = pack(step, torch.ones(4, dtype=torch.bool), torch.ones(8), 1000)
    scores = torch.zeros(8)
    for i, score in enumerate((0.9, 0.2, -0.5, 0.1)):
        scores[(batch.sample == i).nonzero().max()] = score
    found = algorithm.loss(scores, scores[:0], batch)
    first, second = -math.log(sigmoid(0.9 - 0.2)), -math.log(sigmoid(-0.5 - 0.1))
    assert found.tokens.tolist() == pytest.approx([first if g == 0 else second for g in batch.group.tolist()])
    assert found.stats["accuracy"].tolist() == [1, 0]
    assert found.stats["margin"].tolist() == pytest.approx([0.7, -0.6])
    assert found.stats["rewards/chosen"].tolist() == pytest.approx([0.9, -0.5])


def test_length_is_told_apart_from_skill() -> None:
    """Answers of 3 and 1, 20 and 19, 2 and 2 tokens, the chosen one first."""
    lengths = [3, 1, 20, 19, 2, 2]
    sign = torch.tensor([1.0, -1.0] * 3).repeat_interleave(torch.tensor(lengths))
    group = torch.arange(3).repeat_interleave(torch.tensor([4, 39, 4]))
    found = by_length(torch.tensor([1.0, 0.0, 1.0]), sign, group)
    assert found["accuracy/of_longer"].tolist() == [1, 1, 0.5]
    assert found["accuracy/alike_length"].tolist() == [0, 1]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("lora", ["all-linear", "none"])
def test_scores_and_gradients_are_those_of_transformers(lora: str, text: bool, tmp_path: Path) -> None:
    """Pairs packed with their prompt once, against one padded batch of the classifier's own."""
    options: dict[str, Any] = {"lora": lora, "prompts_per_step": 2, "max_completion_length": 32}
    trainer = RewardModelTrainer(args=config(tmp_path / "run", **options), train_dataset=TEXTS if text else None)
    disturb(trainer)
    step = trainer.loop.source.rollout(1, Clock(), lambda tokens: None)
    credit = trainer.algorithm.credit(step)
    found = batches(trainer.loop, step, credit, credit.keep)
    assert any(batch.segments.seen is not None for batch in found), "no prompt is shared"
    loss = sum(trainer.loop.learner.backward(batch, whole(step), Averages()) for batch in found)
    ours = {name: p.grad.clone() for name, p in trainer.policy.trainable.items() if p.grad is not None}
    assert len(ours) == len(trainer.policy.trainable)
    trainer.policy.model.zero_grad()
    trainer.policy.base.set_attn_implementation("eager")
    pairs = [conversation_ids(trainer.tokenizer, s.prompt.text, s.text if text else said(s.text)) for s in step.samples]
    scores = trainer.policy.model(**trainer.tokenizer.pad(pairs, return_tensors="pt")).logits[:, 0]
    expected = -torch.nn.functional.logsigmoid(scores[::2] - scores[1::2]).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5) and abs(loss - math.log(2)) > 1e-4
    for name, p in trainer.policy.trainable.items():
        assert p.grad is not None
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lora", ["all-linear", "none"])
def test_what_it_saves_scores_as_it_did(lora: str, tmp_path: Path) -> None:
    """By `model:RUN`, and by transformers, against what its checkpoint gives."""
    RewardModelTrainer(args=config(tmp_path / "run", lora=lora, max_steps=3)).train()
    resumed = config(tmp_path / "run", lora=lora, max_steps=3, resume=str(tmp_path / "run"))
    trainer = RewardModelTrainer(args=resumed)
    step = trainer.loop.source.rollout(1, Clock(), lambda tokens: None)
    (batch,) = pack(step, torch.ones(32, dtype=torch.bool), torch.zeros(int(step.lengths.sum())), 10_000)
    scores, _ = trainer.policy.outputs(batch)
    expected = {i: scores[batch.sample == i][-1].item() for i in range(32)}
    (reward,) = find_rewards(f"model:{tmp_path / 'run'}")
    prompts = [s.prompt.text for s in step.samples]
    got = reward.function(prompts=prompts, completions=[said(s.text) for s in step.samples])
    assert got == pytest.approx([expected[i] for i in range(32)], abs=1e-5) and len(set(got)) > 16
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert kept.config.num_labels == 1 and kept.config.pad_token_id == trainer.tokenizer.pad_token_id


def test_it_learns_to_tell_right_from_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = RewardModelTrainer(args=config(tmp_path / "run", max_steps=30, dataset_test_split="test")).train()
    first, last = history[0], history[-1]
    assert first["eval/loss"] == pytest.approx(math.log(2)) and first["eval/accuracy"] == 0.5
    assert last["eval/accuracy"] > 0.7 and 0 <= last["eval/accuracy/of_longer"] <= 1
    printed = capsys.readouterr().out
    assert "held-out accuracy 0.5 ->" in printed and f"as a reward it is model:{tmp_path}" in printed
    assert "entropy" not in {name for name, value in last.items() if value is not None}


def test_stop_and_resume_equals_never_stopping(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset_test_split": "test", "learning_rate": 1e-3, "lora_dropout": 0.1}
    take(RewardModelTrainer(args=config(tmp_path / "whole", **options)), 4)
    take(RewardModelTrainer(args=config(tmp_path / "parts", **options)), 2)
    take(RewardModelTrainer(args=config(tmp_path / "parts", **options, resume=str(tmp_path / "parts"))), 2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_a_reward_model_is_no_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    RewardModelTrainer(args=config(tmp_path / "run", max_steps=1)).train()
    with pytest.raises(UsageError, match=f"judge by it: reward_funcs model:{run}"):
        DPOTrainer(args=DPOConfig(model_name_or_path="nanorlhf:adder", adapter_name_or_path=run, dataset_name="digits"))
    capsys.readouterr()
    assert merge.main([run, str(tmp_path / "merged")]) == 2
    assert "is a reward model" in capsys.readouterr().err


def test_what_it_saved_can_be_trained_on(tmp_path: Path) -> None:
    RewardModelTrainer(args=config(tmp_path / "run", max_steps=3)).train()
    trainer = RewardModelTrainer(args=config(tmp_path / "more", model_name_or_path=str(tmp_path / "run" / "model")))
    assert trainer.policy.base.score.weight.any()  # type: ignore[union-attr,operator]


def read(**columns: Any) -> ReadRow:
    answers = {name: columns[name] for name in ("chosen", "rejected") if name in columns}
    return ReadRow("?", columns, answers, list(columns))


def test_of_graded_answers_the_best_and_the_worst_are_compared(tmp_path: Path) -> None:
    graded = {"completions": ["so-so", "bad", "good", "unknown"], "scores": [0.5, -1, 2.0, math.nan]}
    assert better_and_worse(read(**graded)) == ["good", "bad"]
    assert better_and_worse(read(chosen="a", rejected="b")) == ["a", "b"]
    with pytest.raises(UnfitError, match="all have the same score"):
        better_and_worse(read(completions=["a", "b"], scores=[1, 1]))
    with pytest.raises(UsageError, match="as long as each other"):
        better_and_worse(read(completions=["a", "b"], scores=[1]))
    with pytest.raises(UsageError, match="'chosen' and 'rejected'"):
        better_and_worse(read(completion="a"))
    rows = [{"prompt": f"{i}+1=", **graded} for i in range(4)]
    trainer = RewardModelTrainer(args=config(tmp_path / "run", prompts_per_step=4), train_dataset=rows)
    step = trainer.loop.source.rollout(1, Clock(), lambda tokens: None)
    assert [s.text for s in step.samples[:2]] == ["good", "bad"]


def test_mistakes_are_said_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    causal = AutoModelForCausalLM.from_pretrained(shipped_model("nanorlhf:adder"))
    with pytest.raises(UsageError, match="AutoModelForSequenceClassification"):
        RewardModelTrainer(causal, config(tmp_path / "run"))
    where = ["--recipe", "tiny", "--output_dir", str(tmp_path / "run")]
    assert main([*where, "--reward_funcs", "exact_answer"]) == 2
    assert "writes nothing that could be judged" in capsys.readouterr().err
    assert main([*where, "--adapter_name_or_path", "x"]) == 2
    assert "merge it first" in capsys.readouterr().err
    assert main([*where, "--shard_base"]) == 2
    assert "written as a whole" in capsys.readouterr().err
