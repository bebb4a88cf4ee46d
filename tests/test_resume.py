"""Every algorithm, and every option that remembers something, goes on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanorlhf.config.training import OnPolicyConfig
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.raft import RAFTConfig, RAFTTrainer
from nanorlhf.reinforce import REINFORCEConfig, REINFORCETrainer
from nanorlhf.remax import ReMaxConfig, ReMaxTrainer
from nanorlhf.rloo import RLOOConfig, RLOOTrainer
from nanorlhf.trainer import Trainer
from tests.test_trainer import assert_same_outcome, small, take

REMEMBERS = {"kl_coef": 0.05, "kl_target": 0.001, "ref_refresh_steps": 1}
CASES: dict[str, tuple[type[Trainer], type[OnPolicyConfig], dict[str, Any]]] = {
    "adaptive kl and refreshed reference": (GRPOTrainer, GRPOConfig, REMEMBERS),
    "dynamic sampling": (GRPOTrainer, GRPOConfig, {"dynamic_sampling": 2, "overlong_buffer": 4}),
    "rloo": (RLOOTrainer, RLOOConfig, {}),
    "remax": (ReMaxTrainer, ReMaxConfig, {"num_generations": 2}),
    "raft": (RAFTTrainer, RAFTConfig, {}),
    "ema": (REINFORCETrainer, REINFORCEConfig, {"baseline": "ema", "num_generations": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_stop_and_resume_equals_never_stopping(case: str, tmp_path: Path) -> None:
    trainer, config, options = CASES[case]

    def make(name: str, **more: Any) -> Trainer:
        return trainer(args=config(**small(tmp_path / name) | options | more))

    take(make("whole"), 4)
    take(make("parts"), 2)
    take(make("parts", resume=str(tmp_path / "parts")), 2)
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")
