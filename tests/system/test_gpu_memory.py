"""The memory of a card that may be used: one answer, by which everybody goes who looks at it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanorlhf.config.training import TrainConfig
from nanorlhf.engines.launch import free_share
from nanorlhf.memory.planning import card_bytes
from nanorlhf.policy import recomputation
from nanorlhf.policy.logprobs import CHUNK, CUDA_CHUNK, HELD, chunk_size
from nanorlhf.policy.policy import Policy
from nanorlhf.policy.recomputation import Offload
from nanorlhf.system import gpu_memory
from nanorlhf.system.device import CONTEXT, GIB

CARD = torch.device("cuda")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A card of 80 GiB, of which so many are taken; by now CUDA itself has one."""
    gib = [1.0]
    monkeypatch.setattr(gpu_memory, "_share", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (int((80 - gib[0]) * GIB), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    return gib


@pytest.mark.parametrize(
    ("limit", "others", "may"),
    [("auto", 0, 80), ("auto", 30, 50), (40, 0, 40), (40, 30, 40), (40, 60, 40)],
)
def test_what_may_be_used_is_what_was_said_or_what_is_free(
    limit: Any, others: float, may: float, taken: list[float]
) -> None:
    taken[0] += others
    assert card_bytes(TrainConfig(gpu_memory_gib=limit)) == gpu_memory.allowed(CARD) == may * GIB
    taken[0] += 6
    # Of what there was in the beginning, less 6; never more than there is.
    assert gpu_memory.left(CARD) == min(may, 80 - others) * GIB - CONTEXT - 6 * GIB


@pytest.mark.parametrize(("limit", "may"), [("auto", 80), (40, 40)])
def test_everybody_who_looks_at_memory_goes_by_it(
    limit: Any, may: int, taken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(recomputation, "Offload", lambda *args: made.append(args) or Offload(*args))
    policy = Policy(TrainConfig(model_name_or_path="nanorlhf:adder", device="cpu"))
    card_bytes(TrainConfig(gpu_memory_gib=limit))
    recomputation.recompute(policy.base, "auto", CARD)
    assert made[0][1] == recomputation.SHARE * may * GIB  # layers' inputs leave from here on
    taken[0] = may - 3
    assert free_share() == pytest.approx(0.9 * 3 / 80)  # of the card, for the engine
    assert chunk_size(CARD) == 3 * GIB // 4 // HELD  # logits at a time
    taken[0] = may
    assert free_share() == 0 and chunk_size(CARD) == CHUNK
    taken[0] = may - 30
    assert chunk_size(CARD) == CUDA_CHUNK


def test_without_a_limit_all_of_the_card_may_be_used(taken: list[float]) -> None:
    taken[0] = 20
    assert gpu_memory.allowed(CARD) == 80 * GIB and gpu_memory.left(CARD) == 60 * GIB
