"""Recomputed layers whose inputs wait elsewhere: the same gradients, and nothing held meanwhile."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_layers import GradientCheckpointingLayer

from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError
from nanorlhf.learning.packing import pack
from nanorlhf.memory.needs import AT_HAND
from nanorlhf.policy import recomputation
from nanorlhf.policy.policy import Policy
from nanorlhf.policy.recomputation import Offload, Parked
from nanorlhf.policy.sharding import layers_of
from nanorlhf.system import gpu_memory
from tests.models import tiny
from tests.samples import rollout, sample

LAYERS = 5


def made_up(**options: Any) -> Policy:
    torch.manual_seed(0)
    policy = Policy(TrainConfig(device="cpu", lora_dropout=0.1, **options), tiny("qwen3", num_hidden_layers=LAYERS))
    for p in policy.trainable.values():
        p.data += 0.02 * torch.randn(p.shape)
    policy.model.train()
    return policy


def loss(policy: Policy) -> Tensor:
    step = rollout([sample(3 + i, 5 + i, seed=i) for i in range(3)])
    (row,) = pack(step, torch.ones(3, dtype=torch.bool), torch.zeros(int(step.lengths.sum())), 1000)
    torch.manual_seed(1)
    return policy.logprobs(row)[0].sum()


def gradients(policy: Policy) -> list[Tensor]:
    policy.model.zero_grad()
    loss(policy).backward()
    return [p.grad.clone() for p in policy.trainable.values() if p.grad is not None]


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every tensor's ways, in their order."""
    seen: list[str] = []
    out, call, fetch = Parked.__init__, Parked.call, Parked.fetch

    def parked(self: Parked, *args: Any) -> None:
        self.name = f"{len([x for x in seen if x.startswith('out')]) % LAYERS}"  # type: ignore[attr-defined]
        seen.append(f"out {self.name}")  # type: ignore[attr-defined]
        out(self, *args)

    def called(self: Parked) -> None:
        if self.here is None:
            seen.append(f"back {self.name}")  # type: ignore[attr-defined]
        call(self)

    def fetched(self: Parked) -> Tensor:
        tensor = fetch(self)
        seen.append(f"used {self.name}")  # type: ignore[attr-defined]
        return tensor

    for name, method in {"__init__": parked, "call": called, "fetch": fetched}.items():
        monkeypatch.setattr(Parked, name, method)
    return seen


@pytest.mark.parametrize("lora", ["all-linear", "none"])
@pytest.mark.parametrize("offload", ["off", "on"])
def test_as_many_layers_run_twice_as_are_asked_for_and_gradients_are_the_same(
    offload: Literal["off", "on"], lora: str, moves: list[str]
) -> None:
    policy, runs = made_up(lora=lora), [0] * LAYERS
    for i, layer in enumerate[Any](layers_of(policy.base)):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    plain = gradients(policy)
    for count in (2, LAYERS, 1, 4, 0):  # in any order
        recomputation.recompute(policy.base, offload, policy.device, count)
        runs[:] = [0] * LAYERS
        moves.clear()
        assert all(a.equal(b) for a, b in zip(gradients(policy), plain, strict=True))
        assert runs == [2] * count + [1] * (LAYERS - count)
        assert len([m for m in moves if m.startswith("out")]) == (count if offload == "on" else 0)


def test_a_share_of_layers_is_rounded_up() -> None:
    policy, all_of_them = made_up(), []
    for share in (Fraction(25, 28), Fraction(1, 28), Fraction(3, 5), 1):
        policy.recompute(share)
        wrapped = [isinstance(layer.forward, partial) for layer in layers_of(policy.base)]
        all_of_them.append((sum(wrapped), policy.recomputes))
    assert all_of_them == [(5, True), (1, False), (3, False), (5, True)]


@pytest.mark.parametrize("lora", ["all-linear", "none"])
def test_gradients_are_the_same_to_the_last_bit(lora: str, moves: list[str]) -> None:
    plain = gradients(made_up(lora=lora))
    kept = gradients(made_up(lora=lora, gradient_checkpointing=True, activation_offload="off"))
    assert moves == []
    moved = gradients(made_up(lora=lora, gradient_checkpointing=True, activation_offload="on"))
    assert len(plain) == len(kept) == len(moved) > 20
    for a, b, c in zip(plain, kept, moved, strict=True):
        assert a.equal(b) and b.equal(c)


def test_the_last_two_stay_and_the_next_one_is_on_its_way_while_one_is_used(moves: list[str]) -> None:
    policy = made_up(gradient_checkpointing=True, activation_offload="on")
    gradients(policy)
    once = [f"out {i}" for i in range(LAYERS)]
    once += ["used 4", "back 2", "used 3", "back 1", "used 2", "back 0", "used 1", "used 0"]
    assert moves == once
    gradients(policy)
    assert moves == once * 2


def test_what_comes_back_is_what_gradients_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made_up(gradient_checkpointing=True, activation_offload="on")
    expected = gradients(policy)
    fetch = Parked.fetch
    monkeypatch.setattr(Parked, "fetch", lambda self: fetch(self) * 2)
    assert not all(a.equal(b) for a, b in zip(gradients(policy), expected, strict=True))


@pytest.mark.parametrize(("offload", "held"), [("on", AT_HAND), ("off", LAYERS)])
def test_the_device_holds_two_layers_inputs_between_forward_and_backward(offload: str, held: int) -> None:
    policy, inputs = made_up(gradient_checkpointing=True, activation_offload=offload), list[StorageWeakRef]()
    layers = [m for m in policy.base.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    kept = loss(policy)
    assert len(inputs) == len(layers) == LAYERS
    assert sum(not x.expired() for x in inputs) == held
    kept.backward()


class Stream:
    """Plays a stream of a card, and writes down who waits for what."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.events += 1
        return f"copy {self.events - 1}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_memory_is_given_back_by_waiting_and_not_when_the_allocator_finds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    log, empty = list[str](), torch.empty
    compute, aside = Stream("compute", log), Stream("aside", log)

    def allocated(*args: Any, pin_memory: bool = False, **how: Any) -> Tensor:
        log.append("allocates in main memory" if pin_memory else "allocates on the card")
        return empty(*args, **how)

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}:")
        yield
        log.append("then:")

    monkeypatch.setattr(torch, "empty", allocated)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Tensor, "record_stream", None)
    run = Offload(layers=6, least=0)
    run.stream = aside  # type: ignore[assignment]
    alive, parked = list[StorageWeakRef](), list[Any]()
    for i in range(6):
        tensor = torch.full((4,), float(i))
        alive.append(StorageWeakRef(tensor.untyped_storage()))
        log.clear()
        parked.append(run.park(tensor))
        del tensor
        out = ["allocates in main memory", "aside waits for compute", "on aside:", "then:"]
        assert log == out + [f"compute waits for copy {i - 2}"] * (i > 1)
        assert [not x.expired() for x in alive] == [j > i - 2 for j in range(i + 1)]
    back = ["aside waits for compute", "on aside:", "allocates on the card", "then:"]
    for i, expected in [
        (5, ["compute waits for copy 5"]),
        (4, [*back, "compute waits for copy 4"]),  # 3 sets out
        (3, [*back, "compute waits for copy 6"]),
        (2, [*back, "compute waits for copy 7"]),
        (1, [*back, "compute waits for copy 8"]),
        (0, ["compute waits for copy 9"]),
    ]:
        log.clear()
        assert recomputation.unpark(parked.pop()).tolist() == [i] * 4
        assert log == expected


def test_small_rows_stay_where_they_are() -> None:
    run = Offload(layers=4, least=4 * 400)
    assert isinstance(run.park(torch.zeros(100)), Parked)
    for stays in (torch.zeros(99), torch.zeros(1000, dtype=torch.long)):
        assert run.park(stays) is stays
    assert copy.deepcopy(run).least == run.least


def test_auto_is_for_cuda_and_on_needs_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(recomputation, "Offload", lambda *args: made.append(args) or Offload(*args))
    policy = made_up(gradient_checkpointing=True)
    assert made == []
    monkeypatch.setattr(gpu_memory, "allowed", lambda _: 80e9)
    recomputation.recompute(policy.base, "auto", torch.device("cuda"))
    assert made == [(LAYERS, 4e9)]
    with pytest.raises(UsageError, match="activation_offload='on' cannot work: there is nothing to move without"):
        TrainConfig(activation_offload="on", gradient_checkpointing=False)


def test_evaluation_recomputes_and_moves_nothing(moves: list[str]) -> None:
    policy = made_up(gradient_checkpointing=True, activation_offload="on")
    policy.model.eval()
    with torch.no_grad():
        assert loss(policy).isfinite()
    assert moves == []
    assert policy.serving_copy("lora").training is False
