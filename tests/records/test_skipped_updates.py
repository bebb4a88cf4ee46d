"""An update whose numbers are not finite changes nothing, is written down, and ends the run if it goes on so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanorlhf.errors import RunError
from nanorlhf.grpo import GRPO, GRPOTrainer
from nanorlhf.ppo import PPOConfig, PPOTrainer
from nanorlhf.records import skipped_updates
from nanorlhf.trainer import Trainer
from tests.samples import rollout, sample
from tests.test_trainer import config, small


class Breaking:
    """A loss that is no number at chosen steps, in one token of the update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: int, value: float = float("nan")) -> None:
        self.trainer: Trainer | None = None
        plain = GRPO.loss

        def loss(algorithm: GRPO, logprobs: Tensor, entropy: Tensor, batch: Any) -> Any:
            made = plain(algorithm, logprobs, entropy, batch)
            assert self.trainer is not None
            if self.trainer.done + 1 in steps:
                made.tokens = torch.cat([made.tokens[:1] * value, made.tokens[1:]])
            return made

        monkeypatch.setattr(GRPO, "loss", loss)

    def run(self, folder: Path, **options: Any) -> Trainer:
        self.trainer = GRPOTrainer(args=config(folder, dataset_test_split=None, **options))
        return self.trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_update_changes_nothing_and_is_written_down(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Breaking(monkeypatch, 2, value=value).run(tmp_path / "run")
    adapters, versions = [], []
    for _ in trainer.steps():
        adapters.append({name: p.detach().clone() for name, p in trainer.policy.trainable.items()})
        versions.append((trainer.policy.version, trainer.engine.version))
    assert all(p.equal(adapters[1][name]) for name, p in adapters[0].items())
    assert not all(p.equal(adapters[2][name]) for name, p in adapters[1].items()), "the next one is taken"
    assert all(p.isfinite().all() for p in adapters[3].values())
    assert versions[:3] == [(1, 1), (1, 1), (2, 2)]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("updates/left_out") for row in rows] == [None, 0, 1, 0, 0]
    assert rows[2]["loss"] is None and rows[3]["loss"] is not None
    (report,) = json.loads((tmp_path / "run" / "faults" / "step_000002.json").read_text())
    assert report["whose"] == "policy" and report["samples"][0].keys() >= {"prompt", "completion", "reward"}
    assert "step 2: the policy's update was left out: loss" in capsys.readouterr().out


def test_several_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Breaking(monkeypatch, 1, 3, 4, 5).run(tmp_path / "run", max_steps=8)
    with pytest.raises(RunError, match=r"3 updates in a row .*--resume"):
        trainer.train()
    assert trainer.done == 5


def test_a_critic_is_kept_from_broken_updates_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = small(tmp_path / "run") | {
        "dataset_test_split": None,
        "value_init_prompts": 0,
        "num_generations": 1,
        "max_steps": 1,
    }
    trainer = PPOTrainer(args=PPOConfig(**options))
    assert trainer.critic is not None
    before = trainer.critic.snapshot()
    monkeypatch.setattr("nanorlhf.learning.critic.clipped_value", lambda values, *_: values * float("nan"))
    trainer.train()
    assert all(p.equal(before[name]) for name, p in trainer.critic.snapshot().items())
    (report,) = json.loads((tmp_path / "run" / "faults" / "step_000001.json").read_text())
    assert report["whose"] == "critic"


def test_the_report_names_the_samples_with_broken_numbers() -> None:
    made = rollout([sample(3, 4, seed=i) for i in range(4)], 2)
    made.columns["ref_logprobs"] = torch.zeros(16)
    made.columns["ref_logprobs"][5] = torch.nan
    fault = skipped_updates.describe("policy", float("nan"), 1.0, made, torch.tensor([True, True, True, False]))
    assert fault.not_finite == {"ref_logprobs": 1}
    assert [row["completion"] for row in fault.samples] == [made.samples[1].text]
    assert fault.words.endswith("loss nan, gradient norm 1, 1 values of ref_logprobs")
    others = skipped_updates.describe("policy", float("nan"), 1.0, made, torch.tensor([True, False, True, False]))
    assert len(others.samples) == 2 and others.not_finite == {}
