"""DPO: the loss by hand, pairs that stay together, learning, resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nanorlhf.dpo import DPO, DPOConfig, DPOTrainer
from nanorlhf.dpo.__main__ import main
from nanorlhf.errors import UsageError
from nanorlhf.formulas.losses import preference
from nanorlhf.learning.packing import pack
from nanorlhf.policy import attention
from nanorlhf.records.metrics import Averages, Clock
from tests.samples import batches, rollout, sample, whole
from tests.sft.test_sft import SMALL, flags, small, take
from tests.test_trainer import assert_same_outcome


def config(run: Path, **options: Any) -> DPOConfig:
    return DPOConfig(**small(run, options))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_loss_by_hand() -> None:
    """Two pairs, the second with its rejected sample first, their tokens in any order of pairs."""
    gap = torch.tensor([0.5, -0.1, 0.2, 0.3, -0.6, 0.4], requires_grad=True)
    group = torch.tensor([3, 3, 3, 1, 1, 1])  # samples 6, 6, 7, 2, 3, 3
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    tokens, stats = preference(gap, sign, group, beta=2.0)
    first, second = 2 * (0.3 - (-0.6 + 0.4)), 2 * (0.2 - (0.5 - 0.1))  # of samples 2 and 3; of 6 and 7
    losses = [-math.log(sigmoid(second))] * 3 + [-math.log(sigmoid(first))] * 3
    assert tokens.tolist() == pytest.approx(losses)
    assert stats["margin"].tolist() == pytest.approx([first, second])
    assert stats["accuracy"].tolist() == [1, 0]
    assert stats["rewards/chosen"].tolist() == pytest.approx([2 * 0.3, 2 * 0.2])
    assert stats["rewards/rejected"].tolist() == pytest.approx([2 * -0.2, 2 * 0.4])
    (tokens * torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 8, 1 / 8])).sum().backward()  # the mean over pairs
    one, two = -sigmoid(-first), -sigmoid(-second)  # half of 2 beta sigmoid(-margin), up or down
    assert gap.grad is not None
    assert gap.grad.tolist() == pytest.approx([-two, -two, two, one, -one, -one])


@pytest.mark.parametrize("empty", [0, 1])
def test_an_answer_without_tokens_of_its_own_shifts_no_pair(empty: int) -> None:
    """Of three pairs one member of the first has none to train; each pair's margin is of its own two all the same."""
    samples = [sample(2, 3, seed=i, own=[False] * 3 if i == empty else None) for i in range(6)]
    step = rollout(samples, group_size=2)
    step.rewards = torch.tensor([1.0, 0.0] * 3)
    algorithm = DPO(DPOConfig(beta=1.0))
    step.columns["advantages"] = algorithm.credit(step).advantages
    step.columns["ref_logprobs"] = torch.zeros(15)
    (batch,) = pack(step, torch.ones(6, dtype=torch.bool), torch.ones(15), 1000)
    gaps = torch.tensor([0.4, -0.2, 0.7, 0.1, -0.5, 0.3])
    found = algorithm.loss(gaps[batch.sample], batch.weights, batch)
    own = gaps * torch.tensor([0.0 if i == empty else 3.0 for i in range(6)])
    assert found.stats["margin"].tolist() == pytest.approx((own[::2] - own[1::2]).tolist())
    margins = (own[::2] - own[1::2])[batch.group]
    assert found.tokens.tolist() == pytest.approx([-math.log(sigmoid(m)) for m in margins.tolist()])


def test_what_was_chosen_is_what_gains(tmp_path: Path) -> None:
    trainer = DPOTrainer(args=config(tmp_path / "run"))
    rollout = trainer.loop.source.rollout(1, Clock(), lambda tokens: None)
    signs = trainer.algorithm.credit(rollout).advantages[rollout.lengths.cumsum(0) - 1]
    right = [s.text == f"<answer>{s.prompt.columns['answer']}</answer>" for s in rollout.samples]
    assert signs.tolist() == [1 if r else -1 for r in right]


def gradient(trainer: DPOTrainer, token_budget: int) -> tuple[torch.Tensor, float, int]:
    """The gradient of a step with this budget, its loss, and the number of rows."""
    loop = trainer.loop
    loop.passes.tokens = token_budget
    rollout = loop.source.rollout(1, Clock(), lambda tokens: None)
    credit = trainer.algorithm.credit(rollout)
    loop.measure(rollout, credit.keep)
    found = batches(loop, rollout, credit, credit.keep)
    for p in trainer.policy.trainable.values():
        p.grad = None
    loss = sum(loop.learner.backward(batch, whole(rollout), Averages()) for batch in found)
    return (
        torch.cat([p.grad.flatten() for p in trainer.policy.trainable.values() if p.grad is not None]),
        loss,
        len(found),
    )


def test_pairs_packed_together_give_the_gradient_of_one_pair_a_row(tmp_path: Path) -> None:
    trainer = DPOTrainer(args=config(tmp_path / "run"))
    noise = torch.Generator().manual_seed(0)
    for p in trainer.policy.trainable.values():
        p.data += 0.03 * torch.randn(p.shape, generator=noise)
    (whole, loss, rows), (alone, loss2, rows2) = gradient(trainer, 10_000), gradient(trainer, 1)
    assert (rows, rows2) == (1, 16)
    assert loss == pytest.approx(loss2, rel=1e-5) and abs(loss - math.log(2)) > 1e-3
    assert (whole - alone).norm() / whole.norm() < 1e-5


def test_it_learns_which_is_better_and_starts_from_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = DPOTrainer(
        args=config(tmp_path / "run", max_steps=12, dataset_test_split="test", eval_prompts=64)
    ).train()
    first, last = history[0], history[-1]
    assert first["eval/loss"] == pytest.approx(math.log(2)) and first["eval/margin"] == 0
    assert history[1]["loss"] == pytest.approx(math.log(2)) and history[1]["rewards/chosen"] == 0
    assert last["eval/accuracy"] > 0.7 and last["eval/loss"] < 0.68
    assert last["eval/margin"] == pytest.approx(last["eval/rewards/chosen"] - last["eval/rewards/rejected"], abs=1e-5)
    said = capsys.readouterr().out
    assert "engine none needed" in said and "32 completions a step from 16 prompts" in said
    assert "held-out accuracy 0.5 ->" in said
    assert "reward/mean" not in history[1], "health tells by this who learns from rewards"


@pytest.mark.parametrize("lora", ["all-linear", "none"])
def test_stop_and_resume_equals_never_stopping(lora: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset_test_split": "test", "lora": lora, "learning_rate": 1e-3}
    options |= {"lora_dropout": 0.1} if lora != "none" else {"reward_funcs": "exact_answer"}
    whole = take(DPOTrainer(args=config(tmp_path / "whole", **options)), 4)
    parts = take(DPOTrainer(args=config(tmp_path / "parts", **options)), 2)
    parts += take(DPOTrainer(args=config(tmp_path / "parts", **options, resume=str(tmp_path / "parts"))), 2)
    if lora == "none":
        names = ("loss", "margin", "grad_norm", "eval/loss", "eval/reward")
        assert [[row.get(n) for n in names] for row in whole] == [[row.get(n) for n in names] for row in parts]
    else:
        assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_beta_is_an_option_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "tiny", "--beta", "0.5", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "beta: 0.5" in printed and "kl_coef" not in printed
    assert DPOConfig(beta=0.5).beta == 0.5


def test_wrong_input_is_answered_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "chosen": "2"}) + "\n")
    for complaint, options in {"'chosen' and 'rejected'": {"dataset_name": rows}, "above 0": {"beta": 0}}.items():
        assert main([*flags(SMALL | options), "--output_dir", str(tmp_path / "run")]) == 2
        assert complaint in capsys.readouterr().err


def test_a_model_that_cannot_hold_two_samples_in_a_row_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "one_per_row", lambda model: True)
    with pytest.raises(UsageError, match="packs pairs into rows"):
        DPOTrainer(args=config(tmp_path / "run"))
