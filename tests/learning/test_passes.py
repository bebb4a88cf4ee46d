"""Full memory in every phase of a step: survived, with what a smaller budget from the start would have given."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from nanorlhf.errors import RunError, UsageError
from nanorlhf.evaluation import held_out_loss
from nanorlhf.grpo import GRPO, GRPOConfig
from nanorlhf.learning import optimizer
from nanorlhf.learning.critic import Critic
from nanorlhf.learning.passes import Passes
from nanorlhf.loop import Loop
from nanorlhf.policy.policy import Policy
from nanorlhf.ppo import PPO, PPOConfig
from nanorlhf.rollouts.source import Source
from nanorlhf.types import MicroBatch, Rollout
from tests.samples import rollout, sample

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


def made_up(token_budget: int, lora_dropout: float = 0.0) -> Loop:
    """Everything that a step can hold: two adapters, a reference, two updates."""
    config = PPOConfig(
        model_name_or_path="nanorlhf:adder", device="cpu", token_budget=token_budget, updates_per_step=2,
        prompts_per_step=16, learning_rate=1e-3, critic_learning_rate=1e-3, lora_dropout=lora_dropout, kl_coef=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = Policy(config)
    policy.keep_reference()
    critic = Critic(config, policy)
    for p in (*policy.trainable.values(), *critic.weights.values()):
        p.data += 0.02 * torch.randn(p.shape)

    class Given(Source):
        def rollout(self, step: int, clock: Any, progress: Any) -> Rollout:
            return rollout([sample(3 + i % 4, 4 + 3 * i, seed=i) for i in range(16)])

    return Loop(config, PPO(config), policy, Given(), critic=critic)


class FullMemory:
    """Raises once, when `phase` asks for its `nth` row: on the way there, or on the way back."""

    def __init__(self, loop: Loop, phase: str, nth: int, back: bool = False) -> None:
        self.loop, self.wanted, self.nth, self.back = loop, phase, nth, back
        self.phase, self.asked, self.raised = "", Counter[str](), 0
        self.retries, self.hidden = loop.passes.retries, loop.policy.hidden
        loop.passes.retries, loop.policy.hidden = self.in_phase, self.seen  # type: ignore[method-assign]
        for learner in loop.learners:
            learner.measure = partial(self.named, learner.measure)  # type: ignore[method-assign]

    def in_phase(self, phase: str, *rest: Any, **options: Any) -> Any:
        self.phase = phase
        return self.retries(phase, *rest, **options)

    def named(self, measure: Callable[..., Any], name: str, *rest: Any) -> Any:
        self.phase = name
        return measure(name, *rest)

    def seen(self, batch: MicroBatch, model: Any = None) -> Tensor:
        self.asked[self.phase] += 1
        hidden = self.hidden(batch, model)
        if self.phase == self.wanted and self.asked[self.phase] == self.nth and not self.raised:
            if not self.back:
                self.run_out()
            hidden.register_hook(self.run_out)
        return hidden

    def run_out(self, *_: Any) -> None:
        self.raised += 1
        raise torch.OutOfMemoryError(FULL)


def weights(loop: Loop) -> list[Tensor]:
    assert loop.critic is not None
    return [p.detach().clone() for p in (*loop.policy.trainable.values(), *loop.critic.weights.values())]


def expect_same(loop: Loop, other: Loop, metrics: dict[str, Any], expected: dict[str, Any], exact: bool) -> None:
    """The same weights, and everything that the step says of them; to the last bit if all of it was done alike."""
    for a, b in zip(weights(loop), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if exact else 1e-5)
    for name in ("loss", "grad_norm", "kl", "entropy", "value/loss", "clip_fraction", "tokens/trained"):
        assert metrics[name] == pytest.approx(expected[name], rel=0 if exact else 1e-4, abs=0 if exact else 1e-7), name
    for p in loop.policy.model.parameters():
        assert p.grad is None


@pytest.mark.parametrize(
    ("phase", "back", "dropout"),
    [("logprobs", False, 0.2), ("ref_logprobs", False, 0.2), ("values", False, 0.2), ("update", False, 0.2),
     ("update", True, 0.2), ("critic", False, 0.0), ("critic", True, 0.0)],
)  # fmt: skip
def test_every_phase_is_done_again_in_smaller_rows(
    phase: str, back: bool, dropout: float, caplog: pytest.LogCaptureFixture
) -> None:
    loop = made_up(100, dropout)
    memory = FullMemory(loop, phase, 2, back)
    step = loop.step(1)
    assert memory.raised == 1
    measuring = phase in ("logprobs", "ref_logprobs", "values")
    assert loop.passes.tokens == (55 if measuring else 50)  # the longest of the samples; of the first update 31
    assert step.metrics["memory/token_budget"] == loop.passes.tokens
    shown = "measure" if measuring else phase
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"out of memory ({shown}), nothing is lost")
    assert loop.policy.version == 2
    other = made_up(loop.passes.tokens, dropout)
    expect_same(loop, other, step.metrics, other.step(1).metrics, exact=phase == "logprobs")
    loop.step(2)
    assert len(caplog.messages) == 1, "said once, and the budget stays"


def test_the_second_update_is_done_again_alone(caplog: pytest.LogCaptureFixture) -> None:
    loop, other = made_up(100), made_up(100)
    batches = -(-sum(s.row_length for s in other.source.rollout(1, None, None).samples[:8]) // 100)  # type: ignore[arg-type]
    memory = FullMemory(loop, "update", batches + 3)
    step = loop.step(1)
    assert memory.raised == 1 and loop.policy.version == 2 and len(caplog.messages) == 1
    assert loop.learner.optimizer.scheduler.last_epoch == 2
    expect_same(loop, other, step.metrics, other.step(1).metrics, exact=False)


adam: Any = import_module("torch.optim.adam")
ADAM = adam.adam  # what AdamW.step comes to, once the moments are there


@pytest.mark.parametrize("fused", [(), ("cpu",)], ids=["by-tensor", "fused"])
@pytest.mark.parametrize("broken", [False, True], ids=["before", "while-the-moments-are-made"])
def test_an_optimizer_step_is_whole_or_not_at_all(
    broken: bool, fused: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "FUSED", fused)
    loop, raised = made_up(100), []

    def run_out(*lists: Any, **options: Any) -> None:
        if not raised:
            raised.append(1)
            if broken:
                del loop.learner.optimizer.adam.state[loop.learner.optimizer.parameters[0]]["exp_avg_sq"]
            raise torch.OutOfMemoryError(FULL)
        ADAM(*lists, **options)

    monkeypatch.setattr(adam, "adam", run_out)
    metrics = loop.step(1).metrics
    assert raised and loop.policy.version == 2
    other = made_up(loop.passes.tokens)
    expect_same(loop, other, metrics, other.step(1).metrics, exact=False)


@pytest.mark.parametrize("fused", [(), ("cpu",)], ids=["by-tensor", "fused"])
def test_a_half_taken_step_ends_the_run(fused: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "FUSED", fused)
    loop = made_up(100)

    def half(*lists: Any, **options: Any) -> None:
        ADAM(*(x[: len(x) // 2] for x in lists), **options)
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(adam, "adam", half)
    with pytest.raises(RuntimeError, match="neither the old nor the new ones; go on from the last checkpoint"):
        loop.step(1)
    assert loop.policy.version == 1  # not what the last whole step left, so nothing is saved as if it were


def test_below_the_longest_sample_there_is_nothing_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = made_up(100)

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(loop.policy, "hidden", full)
    with pytest.raises(UsageError, match=r"a row of 55 tokens does not fit on its own; lower max_completion_length"):
        loop.step(1)
    assert loop.passes.tokens == 55


def test_other_errors_are_nobodys_business_here(caplog: pytest.LogCaptureFixture) -> None:
    passes = Passes(100)
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(passes, [10, 10], failing(RuntimeError("shapes do not fit")))
    assert passes.tokens == 100 and caplog.messages == []


def test_processes_that_go_through_layers_together_cannot_begin_again() -> None:
    passes = Passes(100, in_step=True)
    with pytest.raises(RunError, match=r"out of memory \(update\): with shard_base, say a smaller token_budget"):
        attempt(passes, [10, 10], failing(torch.OutOfMemoryError(FULL)))


def test_nothing_of_a_failed_attempt_is_kept() -> None:
    """Its tensors are gone before memory is given back, so before the next attempt."""
    passes, held = Passes(100), list[Any]()
    passes.undo = lambda: held.append(kept())

    def work() -> None:
        if not held:
            large = torch.zeros(1000)
            alive.append(weakref.ref(large))
            raise torch.OutOfMemoryError(FULL)

    alive: list[Any] = []

    def kept() -> Any:
        gc.collect()
        return alive[0]()

    attempt(passes, [20] * 9, work)
    assert held == [None]


@pytest.mark.parametrize("words", [FULL, "CUDA error: out of memory", "cublas: CUBLAS_STATUS_ALLOC_FAILED when"])
def test_what_the_driver_calls_it(words: str, caplog: pytest.LogCaptureFixture) -> None:
    passes, calls = Passes(100), []

    def work() -> None:
        calls.append(passes.tokens)
        if passes.tokens > 30:
            raise RuntimeError(words)

    attempt(passes, [20] * 9, work)
    assert calls == [100, 50, 25] and len(caplog.messages) == 2


def test_what_was_tried_counts_not_what_was_allowed() -> None:
    passes, calls = Passes(10_000), []

    def work() -> None:
        calls.append(passes.tokens)
        if passes.tokens > 30:
            raise torch.OutOfMemoryError(FULL)

    attempt(passes, [20] * 3, work)
    assert calls == [10_000, 30]


def attempt(passes: Passes, lengths: list[int], work: Callable[[], None]) -> None:
    for tried in passes.retries("update", max(lengths), sum(lengths), list):
        with tried:
            work()


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_a_resumed_run_starts_with_the_lowered_budget() -> None:
    loop, other = made_up(100), made_up(100)
    assert loop.state_dict(0)["token_budget"] is None
    loop.passes.lower("update", 20, 180)
    other.load_state_dict(loop.state_dict(0))
    assert other.passes.tokens == 50 and other.state_dict(0)["token_budget"] == 50


def test_held_out_answers_are_judged_in_smaller_rows_too(caplog: pytest.LogCaptureFixture) -> None:
    config = GRPOConfig(model_name_or_path="nanorlhf:adder", device="cpu", token_budget=100, num_generations=4)
    torch.manual_seed(0)
    loop = Loop(config, GRPO(config), Policy(config), source=None)  # type: ignore[arg-type]
    step = rollout([sample(3 + i % 4, 4 + 3 * i, seed=i) for i in range(16)], group_size=4)
    step.columns["old_logprobs"] = step.columns["engine_logprobs"]
    everything, credit = torch.ones(16, dtype=torch.bool), loop.algorithm.credit(step)
    loop.measure(step, everything)
    weights = loop.weigh(step, credit, everything, everything)
    expected = held_out_loss(loop.learner, loop.passes, step, weights)
    FullMemory(loop, "evaluation", 3)
    found = held_out_loss(loop.learner, loop.passes, step, weights)
    assert loop.passes.tokens == 55 and len(caplog.messages) == 1
    assert found == pytest.approx(expected, rel=1e-5)
