"""Reward functions that come with TRL are passed as they are, and train."""

# pyright: reportPrivateImportUsage=false
# TRL exports them when they are asked for, which pyright cannot see.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from trl.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from nanorlhf.config.training import TrainConfig
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.scoring.reward import find_rewards
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.types import Prompt, Sample


@pytest.mark.parametrize("workers", [0, 1])
def test_they_say_what_they_say(workers: int) -> None:
    texts = ["<think>\n6 and 7\n</think>\nso \\boxed{42}", "<think>\n6 and 7\n</think>\nso \\boxed{43}", "42"]
    prompt = Prompt(0, [1], [{"role": "user", "content": "6*7"}], {"solution": "$42$"})
    batch = [Sample(prompt, [1] * 90, [], True, text) for text in texts]
    functions = [think_format_reward, accuracy_reward, get_soft_overlong_punishment(100, 20)]
    scorer = Scorer(find_rewards(functions), TrainConfig(reward_workers=workers))
    scorer.score(batch)
    scorer.close()
    assert [list(s.rewards.values()) for s in batch] == [[1, 1, -0.5], [1, 0, -0.5], [0, 0, -0.5]]
    assert batch[0].extras["answer_parsed"].startswith("[42")


def test_they_train(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{a}+11="}], "solution": f"${a + 11}$"} for a in range(10, 30)]
    options: dict[str, Any] = {"model_name_or_path": "nanorlhf:adder", "engine": "hf", "max_prompt_length": 32}
    options |= {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 16, "max_steps": 2}
    functions = [
        think_format_reward,
        accuracy_reward,
        reasoning_accuracy_reward,
        get_soft_overlong_punishment(max_completion_len=16, soft_punish_cache=14),
        get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0),
        get_cosine_scaled_reward(max_len=16),
    ]
    names = [getattr(f, "__name__", type(f).__name__) for f in functions]
    trainer = GRPOTrainer(
        reward_funcs=functions,
        args=GRPOConfig(**options, output_dir=str(tmp_path / "run")),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    history = trainer.train()
    for row in history[1:]:
        assert [row[f"reward/{name}/failed"] for name in names] == [0] * len(names)
        assert row["grad_norm"] > 0
    assert history[1][f"reward/{names[3]}"] < 0
    first = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert first["extras"]["solution"].startswith("$"), "what a reward logs of a sample is kept with it"
