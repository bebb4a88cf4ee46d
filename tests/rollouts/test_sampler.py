"""Groups that teach nothing are replaced, with their share of every column; and every step has its own seed."""

from __future__ import annotations

from pathlib import Path

import torch

from nanorlhf.grpo import GRPOTrainer
from nanorlhf.records.metrics import Clock
from nanorlhf.rollouts.dapo import punish_overlong, refilled
from tests.samples import expect_close, rollout, sample, turns
from tests.test_trainer import config


def test_groups_without_spread_give_way_to_new_ones_with_spread() -> None:
    old = rollout([sample(2, n, seed=i) for i, n in enumerate([1, 2, 3, 1])], group_size=2)
    new = rollout([sample(2, n, seed=9 + i) for i, n in enumerate([2, 1, 1, 2])], group_size=2)
    old.rewards, new.rewards = torch.tensor([1.0, 1, 0, 1]), torch.tensor([0.0, 0, 1, 0])
    old.written, new.written = 7, 6
    old.columns = {"x": torch.arange(7.0)}
    new.columns = {"x": torch.arange(10.0, 16)}
    both = refilled(old, new)
    assert both.samples == [*old.samples[2:], *new.samples[2:]]
    assert both.group.tolist() == [0, 0, 1, 1]
    assert both.rewards.tolist() == [0, 1, 1, 0]
    assert both.columns["x"].tolist() == [3, 4, 5, 6, 13, 14, 15]
    assert both.written == 13


def test_where_nothing_teaches_the_first_groups_stay() -> None:
    old, new = (rollout([sample(2, 1, seed=s + i) for i in range(4)], group_size=2) for s in (0, 9))
    old.rewards, new.rewards = torch.ones(4), torch.ones(4)
    assert refilled(old, new).samples == old.samples


def test_overlong_answers_pay_linearly_over_the_buffer() -> None:
    samples = [sample(1, n, seed=n) for n in (6, 8, 10)]
    for s in samples:
        s.reward = 1.0
    punish_overlong(samples, limit=10, buffer=4)
    far = [sample(1, 40)]
    far[0].reward = 1.0
    punish_overlong(far, limit=10, buffer=4)  # kept rollouts may be longer than the limit of now
    assert far[0].reward == 0.0
    expect_close(torch.tensor([s.reward for s in samples]), [1.0, 0.5, 0.0])


def test_every_step_samples_anew_and_a_repeated_one_the_same(
    tmp_path: Path,
) -> None:
    args = config(tmp_path / "run", dataset_test_split=None, reward_workers=0, temperature=2.0)
    trainer = GRPOTrainer(args=args, train_dataset=[{"prompt": turns("12+34="), "answer": "46"}])

    def written(step: int) -> list[list[int]]:
        made = trainer.loop.source.rollout(step, Clock(), lambda tokens: None)
        return [s.completion_ids for s in made.samples]

    assert written(1) == written(1) != written(2)
    trainer.close()
