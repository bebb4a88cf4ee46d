"""Rows hold every sample once, nothing else, and weights add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.learning.packing import pack, token_weights
from tests.samples import rollout, sample

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=12)


def test_a_row_by_hand() -> None:
    a, b = sample(2, 2), sample(1, 3, own=[True, False, True])
    a.prompt.ids[:], a.completion_ids[:] = [1, 2], [3, 4]
    b.prompt.ids[:], b.completion_ids[:] = [5], [6, 7, 8]
    step = rollout([a, b])
    step.columns["x"] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    (batch,) = pack(step, torch.tensor([True, True]), torch.tensor([1.0, 2, 3, 4]), 100)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.segments.ends.tolist() == [0, 4, 8] and batch.segments.seen is None
    assert batch.targets.tolist() == [3, 4, 6, 8]  # not 7: the policy did not write it
    assert batch.predict_at.tolist() == [1, 2, 4, 6]
    assert batch.sample.tolist() == batch.group.tolist() == [0, 0, 1, 1]
    assert batch.weights.tolist() == [1, 2, 3, 4]
    assert batch.columns["x"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


@settings(deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 80), seed=st.integers(0, 99))
def test_every_kept_token_once_and_in_place(lengths: list[tuple[int, int]], budget: int, seed: int) -> None:
    step = rollout([sample(p, c, seed=i) for i, (p, c) in enumerate(lengths)])
    for i, s in enumerate(step.samples):
        s.prompt.ids[0] = i  # no two are the same
    keep = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed)) < 0.7
    tokens = int(step.lengths.sum())
    step.columns["target"] = torch.tensor([t for s in step.samples for t in s.completion_ids])
    batches = list(pack(step, keep, torch.arange(tokens, dtype=torch.float32), budget))
    seen = torch.cat([b.tokens for b in batches]) if batches else torch.empty(0, dtype=torch.long)
    assert sorted(seen.tolist()) == keep[step.sample].nonzero().flatten().tolist()
    for b in batches:
        assert len(b.input_ids) <= budget or len(b.segments.lengths) == 1  # over the budget only alone
        assert b.columns["target"].equal(b.targets)
        assert b.weights.equal(b.tokens.float())
        assert b.input_ids[b.predict_at + 1].equal(b.targets)


def test_one_per_row() -> None:
    step = rollout([sample(2, 3, seed=i) for i in range(4)])
    batches = list(pack(step, torch.ones(4, dtype=torch.bool), torch.zeros(12), 0))
    assert [b.segments.lengths for b in batches] == [[5], [5], [5], [5]]


def test_weights_by_hand() -> None:
    losses, lengths, all_count = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 1]), torch.tensor([True, True])
    assert (token_weights(lengths, all_count, "token", 4) * losses).sum().item() == pytest.approx(2.0)
    assert (token_weights(lengths, all_count, "sequence", 4) * losses).sum().item() == pytest.approx(2.25)
    assert (token_weights(lengths, all_count, "constant", 4) * losses).sum().item() == pytest.approx(6 / 8)


@pytest.mark.parametrize(("norm", "share"), [("token", 0.5), ("sequence", 0.5), ("constant", 0.25)])
def test_uncounted_samples_weigh_nothing(norm: str, share: float) -> None:
    weights = token_weights(torch.tensor([2, 3]), torch.tensor([True, False]), norm, 4)
    assert weights.tolist() == [share, share, 0, 0, 0]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), norm=st.sampled_from(["token", "sequence"]))
def test_weights_sum_to_one(lengths: list[int], norm: str) -> None:
    weights = token_weights(torch.tensor(lengths), torch.ones(len(lengths), dtype=torch.bool), norm, 50)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
