"""Hints name what is near, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanorlhf.config.training import CriticConfig
from nanorlhf.errors import UsageError, nearest
from nanorlhf.grpo import GRPOTrainer
from nanorlhf.sft import SFTConfig

OPTIONS = CriticConfig().to_dict()


@pytest.mark.parametrize(
    ("name", "near"), [("learning_rat", "learning_rate"), ("max_step", "max_steps"), ("klcoef", "kl_coef")]
)
def test_what_is_near_is_named(name: str, near: str) -> None:
    assert nearest(name, OPTIONS) == f"did you mean {near!r}?"


@pytest.mark.parametrize("name", ["bf17", "x", "fsdp", "deepspeed", "packing"])
def test_what_is_far_is_not(name: str) -> None:
    assert nearest(name, OPTIONS) == "none is like it"


def test_a_few_are_listed_once() -> None:
    assert nearest("x", ["one", "two", "_own"]) == "known are one, two"
    assert nearest("x", ["one", "two"], listed=True) == "none is like it"
    assert nearest("x", ["_own"]) == "there is none yet"


def test_options_of_another_trainer_are_named(tmp_path: Path) -> None:
    class GRPOConfig:
        """TRL's, say."""

    for args in (GRPOConfig(), SFTConfig(output_dir=str(tmp_path))):
        with pytest.raises(UsageError, match=r"args is a .*: it takes GRPOConfig of nanorlhf\.grpo"):
            GRPOTrainer(args=args)  # type: ignore[arg-type]
