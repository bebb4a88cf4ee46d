"""A prompt once for all its answers: the same gradients, with fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evidence.speed import ours
from evidence.speed.benchmark import WORKS
from evidence.speed.workloads import prepare
from nanorlhf.learning import packing
from nanorlhf.learning.optimizer import Optimizer
from nanorlhf.learning.packing import beginning, cut, pack, size
from nanorlhf.learning.shares import divided
from nanorlhf.segments import Segments
from nanorlhf.types import Rollout
from tests.cuda_on_cpu.cases import CASES, Case, loop_of
from tests.models import HYBRID, SERVED, Exactly
from tests.samples import rollout, sample, together

ALGORITHMS = ("ppo", "rloo", "remax", "raft", "reinforce", "dpo", "online_dpo")
SHARED = {
    **{name: Case("grpo", {"kl_coef": 0.1}, name, siblings=True) for name in (*SERVED, *HYBRID)},
    **{name: Case(name, siblings=True) for name in ALGORITHMS},
    **{f"by {norm}": Case("grpo", {"norm": norm}, siblings=True) for norm in ("token", "sequence", "constant")},
    **{name: Case("grpo", {"policy_loss": name}, siblings=True) for name in ("sequence", "gspo", "cispo", "sapo")},
    "two by two": Case("grpo", CASES["two by two"].options, siblings=True),
}
BEGUN = {f"{name}, begun alike": replace(case, common=9) for name, case in SHARED.items()}


def groups(*sizes: tuple[int, list[int]]) -> Rollout:
    """Groups of one prompt and answers of these lengths each; no two prompts begin alike."""
    made = [together([sample(1, n, seed=i) for i, n in enumerate(answers)], len(answers), p) for p, answers in sizes]
    for number, group in enumerate(made):
        for s in group:
            s.prompt.ids[0] = number  # no two groups have the same
    step = rollout([s for group in made for s in group])
    step.group = torch.arange(len(sizes)).repeat_interleave(torch.tensor([len(answers) for _, answers in sizes]))
    return step


def alone(step: Rollout, row: Any) -> list[tuple[list[int], list[int]]]:
    """Families of one answer each."""
    return [(step.samples[i].prompt.ids, [i]) for i in row]


def learned(case: Case) -> tuple[list[Tensor], int]:
    """Every gradient that optimizers see in a step in float64, and how many tokens passed through the model."""
    loop, seen, tokens = loop_of(case, "cpu"), list[Tensor](), list[int]()
    loop.policy.model.double()
    loop.policy.base.set_experts_implementation("eager")  # the other has no kernel for float64
    for learner in loop.learners[1:]:
        learner.head.double()  # type: ignore[attr-defined]  # the critic's

    def keep(adam: torch.optim.Optimizer, *_: Any) -> None:
        seen.append(torch.cat([p.grad.flatten() for group in adam.param_groups for p in group["params"]]))

    def pass_by(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        tokens.append(kwargs["input_ids"].numel())

    for learner in loop.learners:
        learner.optimizer.adam.register_step_pre_hook(keep)
    watch = loop.policy.base.base_model.register_forward_pre_hook(pass_by, with_kwargs=True)
    with Exactly():
        loop.step(1)
    watch.remove()
    return seen, sum(tokens)


@pytest.fixture
def double() -> Iterator[None]:
    """With float64 for all that is made, what is measured among it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", SHARED | BEGUN)
def test_gradients_are_those_of_samples_with_prompts_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = (SHARED | BEGUN)[name]
    found, computed = learned(case)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "beginning", lambda *_: 0)
        patch.setattr(packing, "families", alone)
        expected, written = learned(case)
    assert len(found) == len(expected) > 0 and all(x.norm() > 0 for x in expected)
    assert all((a - b).norm() / b.norm() < 1e-10 for a, b in zip(found, expected, strict=True))
    one_answer = name.startswith("raft")  # is what is left of each prompt
    assert (computed < written) == (case.architecture not in HYBRID and (not one_answer or case.common > 0))


def test_a_row_of_siblings_by_hand() -> None:
    step = groups((2, [2, 0, 1]), (1, [3]))
    first, second = step.samples[0].prompt.ids, step.samples[3].prompt.ids
    a, _, b, c = (s.completion_ids for s in step.samples)
    (batch,) = pack(step, torch.ones(4, dtype=torch.bool), torch.arange(6.0), 100)
    assert batch.input_ids.tolist() == [*first, *a, *b, *second, *c]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3]
    assert batch.predict_at.tolist() == [1, 2, 1, 5, 6, 7]  # the prompt's last token predicts both first ones
    assert batch.targets.tolist() == [*a, *b, *c]
    assert batch.sample.tolist() == [0, 0, 2, 3, 3, 3]
    pieces = batch.segments
    assert pieces.lengths == [2, 2, 1, 4] and pieces.families == [(2, 2, 1), (4,)]
    assert pieces.ends.tolist() == [0, 2, 4, 5, 9] and pieces.seen_ends.tolist() == [0, 2, 6, 9, 13]
    assert pieces.seen is not None
    assert pieces.seen.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8]
    assert pieces.visible == [2, 4, 3, 4]


def test_a_row_of_prompts_that_begin_alike_by_hand() -> None:
    step = groups((5, [2, 1]), (4, [3]))
    for s in step.samples:
        s.prompt.ids[:3] = [7, 8, 9]
    first, second = step.samples[0].prompt.ids, step.samples[2].prompt.ids
    a, b, c = (s.completion_ids for s in step.samples)
    (batch,) = pack(step, torch.ones(3, dtype=torch.bool), torch.arange(6.0), 100)
    assert batch.input_ids.tolist() == [7, 8, 9, *first[3:], *a, *b, *second[3:], *c]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 3, 4, 5, 6]
    assert batch.predict_at.tolist() == [4, 5, 4, 8, 9, 10]
    assert batch.targets.tolist() == [*a, *b, *c]
    pieces = batch.segments
    assert pieces.common == 3 and pieces.families == [(2, 2, 1), (4,)]
    assert pieces.lengths == [3, 2, 2, 1, 4] and pieces.visible == [3, 5, 7, 6, 7]
    assert pieces.ends.tolist() == [0, 3, 5, 7, 8, 12] and pieces.seen_ends.tolist() == [0, 3, 8, 15, 21, 28]
    assert pieces.seen is not None
    assert pieces.seen.split(pieces.visible)[3].tolist() == [0, 1, 2, 3, 4, 7]
    assert pieces.seen.split(pieces.visible)[4].tolist() == [0, 1, 2, 8, 9, 10, 11]


def test_a_beginning_is_shared_if_that_saves_a_tenth() -> None:
    step = groups((20, [9, 9]), (12, [9]), (30, [9]))
    everyone = torch.ones(4, dtype=torch.bool)
    for s in step.samples:
        s.prompt.ids[:11] = range(11)
    assert beginning(step, everyone) == 11
    assert beginning(step, torch.tensor([True, True, False, False])) == 0  # a prompt alone is shared as it is
    assert beginning(step, torch.zeros(4, dtype=torch.bool)) == 0
    for s in step.samples[:3]:
        s.prompt.ids[:12] = range(12)
    assert beginning(step, torch.tensor([True, True, True, False])) == 11  # not all of the second prompt
    step.samples[3].prompt.ids[4] = -1
    assert beginning(step, everyone) == 0  # 4 tokens, two times, of 98


def test_tokens_are_counted_as_they_are_computed() -> None:
    step = groups((90, [9] * 8), (5, [7]))
    assert size(step, range(8)) == -(-(8 * (90 + 72) + 90 + 8 * 99) // 12) == 182  # what is gathered counts for more
    assert size(step, [0, 1]) == 90 + 18
    assert size(step, [8]) == 12
    assert size(step, range(9)) == -(-(8 * (162 + 12) + 90 + 8 * 99 + 12) // 12)
    assert size(step, range(8), at_once=90 + 72) == 90 + 72  # attention takes them together, and gathers nothing
    assert size(step, range(8), at_once=90 + 71) == 182


def test_a_group_that_does_not_fit_is_cut_and_its_prompt_comes_again() -> None:
    step = groups((10, [5] * 6))
    everyone = torch.ones(6, dtype=torch.bool)
    assert cut(step, everyone, 20) == [[0, 1], [2, 3], [4, 5]]
    assert cut(step, everyone, 20, together=3) == [[0, 1, 2], [3, 4, 5]]  # three may not be parted
    assert cut(step, everyone, 1000) == [[0, 1, 2, 3, 4, 5]]
    assert cut(step, everyone, 0) == [[i] for i in range(6)]
    rows = list(pack(step, everyone, torch.zeros(30), 20))
    assert [len(row.input_ids) for row in rows] == [20, 20, 20]


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(0, 20), min_size=1, max_size=6)), min_size=1),
    budget=st.integers(0, 120),
    parts=st.integers(1, 4),
    common=st.integers(0, 30),
)
def test_every_token_once_in_place_and_under_the_budget(
    sizes: list[tuple[int, list[int]]], budget: int, parts: int, common: int
) -> None:
    step = groups(*sizes)
    for prompt in {id(s.prompt): s.prompt for s in step.samples}.values():
        prompt.ids[1:1] = range(common)
        prompt.ids[: common + 1] = [*range(common), prompt.ids[0]]  # what they begin with, then what differs
    everyone = torch.ones(len(step.samples), dtype=torch.bool)
    tokens = int(step.lengths.sum())
    step.columns["target"] = torch.tensor([t for s in step.samples for t in s.completion_ids], dtype=torch.long)
    shares = divided(step, everyone, parts)
    assert torch.stack(shares).sum(0).tolist() == [1] * len(everyone)
    rows = [row for share in shares for row in pack(step, share, torch.arange(tokens, dtype=torch.float32), budget)]
    assert sorted(torch.cat([row.tokens for row in rows]).tolist()) == list(range(tokens))
    for row in rows:
        assert row.columns["target"].equal(row.targets) and row.weights.equal(row.tokens.float())
        assert len(row.input_ids) <= budget or len(row.sample.unique()) <= 1 or len(row.segments.families) == 1
        segments = row.segments
        seen = torch.arange(len(row.input_ids)) if segments.seen is None else segments.seen
        for at, target, owner in zip(row.predict_at, row.targets, row.sample, strict=True):
            piece = int(torch.searchsorted(segments.ends, at, right=True)) - 1
            places = seen[segments.seen_ends[piece] : segments.seen_ends[piece + 1]]
            tokens_seen = row.input_ids[places[places <= at]]
            whole = step.samples[int(owner)]
            before = whole.prompt.ids + whole.completion_ids
            assert tokens_seen.tolist() == before[: len(tokens_seen)] and before[len(tokens_seen)] == target
            assert row.position_ids[at] == len(tokens_seen) - 1


def test_groups_stay_whole_among_processes_if_that_is_even() -> None:
    everyone = torch.ones(8, dtype=torch.bool)
    assert divided(groups((90, [9] * 4), (90, [9] * 4)), everyone, 2)[0].tolist() in (
        [True] * 4 + [False] * 4, [False] * 4 + [True] * 4,
    )  # fmt: skip
    one = groups((10, [20] * 8))
    assert [int(part.sum()) for part in divided(one, everyone, 2)] == [4, 4]


def test_segments_of_whole_samples_see_nothing_else() -> None:
    segments = Segments.of([(3, [4]), (0, [2]), (5, [0])])
    assert segments.lengths == segments.visible == [7, 2, 5] and segments.seen is None


@pytest.mark.evidence
@pytest.mark.slow
def test_a_real_models_gradients_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    work = replace(WORKS["smol"]["full"], prompts=3)
    prepare(tmp_path, work)
    found: list[Tensor] = []
    plain = Optimizer.step

    def step(optimizer: Optimizer, loss: float) -> tuple[float, float]:
        found.append(torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None]))
        return plain(optimizer, loss)

    monkeypatch.setattr(Optimizer, "step", step)
    tokens = [ours.update(tmp_path, work, work.rollout())["row_tokens"]]
    monkeypatch.setattr(packing, "families", alone)
    monkeypatch.setattr(packing, "beginning", lambda *_: 0)
    tokens += [ours.update(tmp_path, work, work.rollout())["row_tokens"]]
    assert tokens[0] < tokens[1] / 4
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-4
