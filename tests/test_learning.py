"""Each algorithm, each setting of the GRPO family and each engine teaches the small model, in a dozen steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nanorlhf.cli import parse
from nanorlhf.config.training import OnPolicyConfig
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.ppo import PPOConfig, PPOTrainer
from nanorlhf.raft import RAFTConfig, RAFTTrainer
from nanorlhf.reinforce import REINFORCEConfig, REINFORCETrainer
from nanorlhf.remax import ReMaxConfig, ReMaxTrainer
from nanorlhf.rloo import RLOOConfig, RLOOTrainer
from nanorlhf.scripts.statistics import differ
from nanorlhf.sft import SFTConfig, SFTTrainer
from nanorlhf.trainer import Trainer
from tests.samples import snippet

ROOT = Path(__file__).parents[1]
CASES: dict[str, tuple[type[Trainer], type[OnPolicyConfig], list[str]]] = {
    "grpo": (GRPOTrainer, GRPOConfig, []),
    "ppo": (PPOTrainer, PPOConfig, []),
    "rloo": (RLOOTrainer, RLOOConfig, []),
    "remax": (ReMaxTrainer, ReMaxConfig, []),
    "raft": (RAFTTrainer, RAFTConfig, []),
    "reinforce": (REINFORCETrainer, REINFORCEConfig, []),
    "dapo": (GRPOTrainer, GRPOConfig, ["--recipe", "dapo", "--overlong_buffer", "8"]),
    "dr_grpo": (GRPOTrainer, GRPOConfig, ["--recipe", "dr_grpo"]),
    "gspo": (GRPOTrainer, GRPOConfig, ["--recipe", "gspo"]),
    "cispo": (GRPOTrainer, GRPOConfig, ["--recipe", "cispo"]),
    "sapo": (GRPOTrainer, GRPOConfig, ["--recipe", "sapo"]),
    "opo": (GRPOTrainer, GRPOConfig, ["--advantage", "opo", "--importance_correction", "sequence"]),
    "maxrl": (GRPOTrainer, GRPOConfig, ["--advantage", "maxrl", "--entropy_coef", "0.001"]),
    "gpg": (GRPOTrainer, GRPOConfig, ["--advantage", "gpg", "--top_entropy_fraction", "0.5"]),
    "kl": (GRPOTrainer, GRPOConfig, ["--kl_coef", "0.01", "--kl_target", "0.2", "--ref_refresh_steps", "4"]),
    "updates": (GRPOTrainer, GRPOConfig, ["--updates_per_step", "2", "--dual_clip", "3"]),
    "full": (GRPOTrainer, GRPOConfig, ["--lora", "none", "--learning_rate", "1e-4"]),
}

FIRST = ("grpo", "remax", "raft")  # a group, a greedy baseline, the best alone; ppo climbs in its own tests


def climb(case: str, run: Path, *extra: str) -> list[float]:
    """Held-out rewards at the start and after twelve steps."""
    trainer, config, argv = CASES[case]
    name = trainer.algorithm_class.name
    chosen = argv[1] if "--recipe" in argv else ""
    argv = ["--recipe", f"tiny,{chosen}".strip(","), *argv[2 if chosen else 0 :], *extra]
    argv += ["--max_steps", "12", "--eval_steps", "0", "--save_steps", "0", "--output_dir", str(run), "--device", "cpu"]
    history = trainer(args=parse(config, name, ROOT / name / "recipes", argv)[1]).train()
    return [row["eval/reward"] for row in history if "eval/reward" in row]


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST)
def test_learns(case: str, tmp_path: Path) -> None:
    before, after = climb(case, tmp_path / "run", "--engine", "hf")
    assert before <= 0.45
    assert after >= 0.6


@pytest.mark.slow
@pytest.mark.evidence
@pytest.mark.parametrize("case", [case for case in CASES if case not in FIRST])
def test_every_other_setting_learns(case: str, tmp_path: Path) -> None:
    test_learns(case, tmp_path)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("sync", ["merged", "lora"])
def test_learns_through_vllm(sync: str, tmp_path: Path) -> None:
    before, after = climb("grpo", tmp_path / "run", "--engine", "vllm", "--weight_sync", sync)
    assert before <= 0.45
    assert after >= 0.6
    rows = [yaml.safe_load(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["mismatch/mean_abs"] for row in rows[1:]) < 1e-4


@pytest.mark.slow
def test_the_algorithm_on_the_page_of_algorithms_learns(tmp_path: Path) -> None:
    (tmp_path / "middle.py").write_text(snippet("middle.py"))
    before, after = climb("grpo", tmp_path / "run", "--engine", "hf", "--algorithm", f"{tmp_path}/middle.py:Middle")
    assert before <= 0.45
    assert after >= 0.6


@pytest.mark.slow
@pytest.mark.evidence
def test_a_small_model_learns_to_use_the_calculator(tmp_path: Path) -> None:
    """Recipe after recipe: half of the demonstrations guess, and after some steps of GRPO hardly an answer does."""
    start, run = tmp_path / "start", tmp_path / "run"
    first = ["--recipe", "calculator", "--output_dir", str(start)]
    SFTTrainer(args=parse(SFTConfig, "sft", ROOT / "sft" / "recipes", first)[1]).train()
    then = ["--recipe", "calculator", "--model_name_or_path", str(start), "--output_dir", str(run)]
    then += ["--engine", "hf", "--max_steps", "12"]
    history = GRPOTrainer(args=parse(GRPOConfig, "grpo", ROOT / "grpo" / "recipes", then)[1]).train()
    before, after = history[0]["eval/reward"], history[-1]["eval/reward"]
    shares = [[True] * round(share * 256) + [False] * round((1 - share) * 256) for share in (before, after)]
    assert after > before + 0.1
    assert differ(*shares) < 0.001
    assert all(row["mismatch/max_abs"] < 1e-3 for row in history[1:])
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    last = [row["completion"] for row in samples if row["step"] == 12]
    assert sum("<result>" in text for text in last) > 0.6 * len(last)
