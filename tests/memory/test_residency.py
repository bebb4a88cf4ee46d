"""Residency: who moves when, and that nobody notices."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanorlhf import assembly
from nanorlhf.grpo import GRPO, GRPOConfig, GRPOTrainer
from nanorlhf.learning import optimizer as optim
from nanorlhf.loop import Loop
from nanorlhf.memory.plan import MOVES, Needs, Phase, Plan, Resident, Unit
from nanorlhf.memory.residency import CPU, Offloadable, Residency, ServedWeights
from nanorlhf.memory.workspace import Line, Workspace
from nanorlhf.policy.policy import Policy
from nanorlhf.policy.sharding import layers_of
from nanorlhf.ppo import PPOConfig, PPOTrainer
from nanorlhf.system.device import GIB
from nanorlhf.trainer import Trainer

USED: dict[Unit, frozenset[Phase]] = {
    "engine": frozenset({"generate"}),
    "reward model": frozenset({"score"}),
    "reference": frozenset({"measure"}),
    "optimizer": frozenset({"update"}),
    "critic": frozenset({"measure", "update"}),
    "policy": frozenset({"measure", "update"}),
}


SUM: dict[str, Any] = {
    "model_name_or_path": "nanorlhf:adder",
    "dataset_name": "arithmetic",
    "reward_funcs": "exact_answer",
    "device": "cpu",
    "engine": "hf",
    "max_prompt_length": 32,
    "max_completion_length": 12,
}


def a_plan(*moved: Unit) -> Plan:
    """A plan by which these units move, and the others stay."""
    residents = tuple(Resident(unit, GIB, USED[unit], unit) for unit in MOVES)
    flat = Workspace(Line(0, 0), Line(0, 0), Line(0, 0))
    needs = Needs(residents, 100, flat, flat, flat, Line(0, 0), math.inf, flat, sequence=1, requests=256)
    return Plan(needs, 80 * GIB, frozenset(moved), False, 300, cache=256)


@pytest.mark.parametrize("moved", [("reward model", "policy"), ()])
def test_a_reward_model_that_moves_waits_in_main_memory_while_the_policy_is_loaded(moved: tuple[Unit, ...]) -> None:
    cuda, log = torch.device("cuda"), list[str]()
    judge = SimpleNamespace(enter=lambda device: log.append(device.type), leave=lambda: log.append("left"))
    reward = SimpleNamespace(function=SimpleNamespace(classifier=judge))
    residency = Residency(a_plan(*moved), cuda)
    assembly.register(residency, SimpleNamespace(tensors=list, frozen=None), None, [reward])  # type: ignore[arg-type,list-item]
    assert (log, residency.away) == (["cpu"], {"reward model"}) if moved else (["cuda"], set())


def test_a_card_that_torch_does_not_see_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, device, said in ((None, "auto", 0), ("13.0", "cpu", 0), ("13.0", "auto", 1)):
        monkeypatch.setattr(torch.version, "cuda", built)
        caplog.clear()
        assert assembly.plan_memory(SimpleNamespace(config=GRPOConfig(device=device)), None) is None  # type: ignore[arg-type]
        assert len(caplog.messages) == said


class Fake:
    """Writes down where it goes."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def leave(self) -> None:
        self.log.append(f"-{self.name}")

    def enter(self, device: torch.device) -> None:
        self.log.append(f"+{self.name}")


def moves(*moved: Unit) -> list[str]:
    """A step's moves, after a first step."""
    residency, log = Residency(a_plan(*moved)), []
    for unit in MOVES:
        residency.add(unit, Fake(unit, log))
    for phase in ("generate", "score", "measure", "update") * 2:
        if phase == "generate":
            log.clear()
        with residency.phase(phase):
            log.append(phase)
    return log


def test_nothing_moves_by_a_plan_that_moves_nothing() -> None:
    assert moves() == ["generate", "score", "measure", "update"]


def test_only_the_engine_sleeps() -> None:
    assert moves("engine") == ["+engine", "generate", "-engine", "score", "measure", "update"]


def test_everybody_leaves_before_anybody_comes_and_the_engine_comes_last() -> None:
    assert moves(*MOVES) == [
        *("-optimizer", "-critic", "-policy", "+engine", "generate"),
        *("-engine", "+reward model", "score"),
        *("-reward model", "+reference", "+critic", "+policy", "measure"),
        *("-reference", "+optimizer", "update"),
    ]


def test_without_a_plan_nothing_happens() -> None:
    residency, log = Residency(), []
    residency.add("engine", Fake("engine", log))
    with residency.phase("update"):
        assert not log
    assert residency.metrics().keys() == {"memory/peak_gib"}


def test_a_peak_is_set_beside_what_was_planned_for_without_what_is_kept_back() -> None:
    residency = Residency(a_plan(), torch.device("cuda"))
    residency.peaks = {"update": 6.5}
    metrics = residency.metrics()
    # Six units of 1 GiB, and CUDA's own.
    assert (metrics["memory/update/peak_gib"], metrics["memory/update/planned_gib"]) == (6.5, 7 + 256 / GIB)


def test_an_engine_that_comes_back_serves_the_newest_weights() -> None:
    log: list[Any] = []

    class Engine:
        def sleep(self) -> None:
            log.append("sleep")

        def wake(self) -> None:
            log.append("wake")

        def update(self, weights: Any) -> None:
            log.append(weights)

    served = ServedWeights(Engine(), "weights")  # type: ignore[arg-type]
    served.leave()
    served.enter(CPU)
    assert log == ["sleep", "wake", "weights"]


def test_tensors_come_back_as_they_left_whoever_refers_to_them() -> None:
    layer = torch.nn.Linear(5, 3)
    frozen = torch.nn.Parameter(torch.randn(7).to(torch.bfloat16), requires_grad=False)
    moved = Offloadable(lambda: [*layer.parameters(), layer.weight, frozen])
    weight, before = layer.weight, [t.clone() for t in moved.tensors]
    assert len(before) == 3  # tied ones count once
    places = [{t.data_ptr() for t in moved.tensors}]
    for _ in range(2):
        moved.leave()
        places.append({t.data_ptr() for t in moved.tensors})
        moved.enter(CPU)
        places.append({t.data_ptr() for t in moved.tensors})
    assert layer.weight is weight and all(torch.equal(a, b) for a, b in zip(before, moved.tensors, strict=True))
    assert places[1] == places[3]  # main memory is taken once
    assert not places[1] & (places[0] | places[2] | places[4])


def test_what_learns_is_copied_out_and_what_is_frozen_only_when_written_to() -> None:
    learns = torch.nn.Parameter(torch.zeros(2))
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    moved = Offloadable(lambda: [learns, frozen])
    moved.leave()
    moved.enter(CPU)
    for _, home, _ in moved.kept.values():
        home.fill_(9.0)  # shows if it is not overwritten
    learns.data += 1
    moved.leave()
    assert learns.tolist() == [1, 1] and frozen.tolist() == [9, 9]
    moved.enter(CPU)
    with torch.no_grad():
        frozen.mul_(2)
    moved.leave()
    assert frozen.tolist() == [18, 18]


def test_what_is_new_since_the_last_time_moves_too() -> None:
    tensors = [torch.ones(2)]
    moved = Offloadable(lambda: tensors)
    moved.leave()
    moved.enter(CPU)
    tensors.append(torch.full((3,), 2.0))
    moved.leave()
    moved.enter(CPU)
    assert [t.tolist() for t in tensors] == [[1, 1], [2, 2, 2]]


def history(trainer: type[Trainer], folder: Path, **options: Any) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Numbers of a short run that do not hang on the clock; its weights and moments in the end."""
    config = trainer.config_class(output_dir=str(folder), max_steps=3, prompts_per_step=4, **SUM, **options)
    drop = ("time/", "throughput/", "memory/", "value_init/seconds")
    run = trainer(args=config)
    steps = [{k: v for k, v in step.items() if not k.startswith(drop)} for step in run.train()]
    assert all(optimizer.adam.defaults["fused"] for optimizer in [learner.optimizer for learner in run.loop.learners])
    learned = [p for optimizer in [learner.optimizer for learner in run.loop.learners] for p in optimizer.parameters]
    return steps, [t.detach().clone() for t in (*learned, *run.loop.moments())]


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (GRPOTrainer, {"kl_coef": 0.1, "num_generations": 4, "updates_per_step": 2}),
        (GRPOTrainer, {"kl_coef": 0.1, "num_generations": 4, "lora": "none", "ref_refresh_steps": 1}),
        (PPOTrainer, {"value_init_prompts": 40, "value_init_epochs": 1}),
        (PPOTrainer, {"value_init_prompts": 0, "critic_model_name_or_path": "nanorlhf:adder"}),
        (PPOTrainer, {"value_init_prompts": 0, "critic_model_name_or_path": "nanorlhf:adder", "lora": "none"}),
    ],
)
def test_a_run_is_the_same_when_everybody_moves(
    trainer: type[Trainer], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"learning_rate": 1e-3}
    monkeypatch.setattr(optim, "FUSED", ("cpu",))  # as on the devices where anything moves
    still, kept = history(trainer, tmp_path / "still", **options)
    gone: set[Unit] = set()
    prepare = Residency.prepare

    def noted(self: Residency, wanted: frozenset[Unit]) -> None:
        prepare(self, wanted)
        gone.update(self.away)

    monkeypatch.setattr(Residency, "prepare", noted)
    monkeypatch.setattr(assembly, "plan_memory", lambda *_: a_plan(*MOVES))
    moving, moved = history(trainer, tmp_path / "moving", **options, token_budget=2048)
    assert moving == still
    assert len(kept) > 60 and all(a.equal(b) for a, b in zip(kept, moved, strict=True))
    assert gone >= {"engine", "policy", "optimizer"}
    assert ("critic" in gone) == (trainer is PPOTrainer)
    assert ("reference" in gone) == (options.get("lora") == "none")


def test_a_step_is_fused_where_training_runs_on_cuda_wherever_the_weights_lie() -> None:
    config = GRPOConfig(model_name_or_path="nanorlhf:adder", device="cpu")
    policy = Policy(config)
    for device, fused in (("cuda", True), ("cpu", None)):
        policy.device = torch.device(device)
        loop = Loop(config, GRPO(config), policy, source=None)  # type: ignore[arg-type]
        assert loop.learner.optimizer.adam.defaults["fused"] is fused
        assert not any(p.is_cuda for p in loop.learner.optimizer.parameters)


def test_the_plan_says_how_many_tokens_a_micro_batch_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "plan_memory", lambda *_: a_plan())
    config = GRPOConfig(output_dir=str(tmp_path / "run"), **SUM)
    trainer = GRPOTrainer(args=config)
    assert trainer.loop.passes.tokens == 300 and not trainer.policy.recomputes
    trainer.close()


def test_the_plan_says_how_many_layers_are_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = replace(a_plan(), needs=replace(a_plan().needs, layers=28), recompute=17)
    monkeypatch.setattr(assembly, "plan_memory", lambda *_: planned)
    config = PPOConfig(output_dir=str(tmp_path / "run"), critic_model_name_or_path="nanorlhf:adder", **SUM)
    trainer = PPOTrainer(args=config)
    assert trainer.critic
    for body in (trainer.policy, trainer.critic.body):  # 17 of 28 are two of three
        wrapped = [isinstance(layer.forward, partial) for layer in layers_of(body.base)]
        assert wrapped == [True, True, False] and not body.recomputes
    trainer.close()
