"""Two adapters on one base: each learns, neither touches the other; and a critic with a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanorlhf.assembly import check_critic
from nanorlhf.config.names import shipped_model
from nanorlhf.errors import UsageError
from nanorlhf.learning.critic import Critic
from nanorlhf.learning.packing import pack
from nanorlhf.loop import Loop
from nanorlhf.policy.policy import Policy
from nanorlhf.policy.serialization import save
from nanorlhf.ppo import PPO, PPOConfig
from nanorlhf.records.metrics import Averages, explained_variance
from nanorlhf.types import Rollout
from tests.samples import batches, rollout, sample, updated, whole


def made_up(**options: Any) -> tuple[Loop, Critic, Rollout]:
    """A loop whose adapters and head are past their zeros, and a measured rollout."""
    config = PPOConfig(
        model_name_or_path="nanorlhf:adder", device="cpu", critic_learning_rate=1e-3, learning_rate=1e-3, **options
    )
    torch.manual_seed(0)
    policy = Policy(config)
    critic = Critic(config, policy)
    for p in (*policy.trainable.values(), *critic.weights.values()):
        p.data += 0.02 * torch.randn(p.shape)
    loop = Loop(config, PPO(config), policy, source=None, critic=critic)  # type: ignore[arg-type]
    step = rollout([sample(3 + i % 4, 4 + i, seed=i) for i in range(8)])
    loop.policy.keep_reference()
    loop.measure(step, torch.ones(8, dtype=torch.bool))
    return loop, critic, step


def copies(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def moved(before: dict[str, Tensor], policy: Policy) -> set[str]:
    return {name for name, p in policy.model.named_parameters() if not p.equal(before[name])}


def recorded_gradients(optimizer: Any, into: list[float]) -> Any:
    """An optimizer's step that first notes every parameter's gradient, or its absence."""
    step = optimizer.step

    def noting(loss: float = 0.0) -> float:
        into.extend(0.0 if p.grad is None else p.grad.norm().item() for p in optimizer.parameters)
        return step(loss)

    return noting


def test_both_adapters_get_gradients_and_move_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, critic, step = made_up()
    policy, keep = loop.policy, torch.ones(8, dtype=torch.bool)
    policys, critics = set(policy.trainable), {name for name in critic.weights if not name.startswith("head.")}
    assert len(policys) == len(critics) == 42 and not policys & critics
    gradients: dict[str, list[float]] = {"policy": [], "critic": []}
    monkeypatch.setattr(loop.learner.optimizer, "step", recorded_gradients(loop.learner.optimizer, gradients["policy"]))
    monkeypatch.setattr(critic.optimizer, "step", recorded_gradients(critic.optimizer, gradients["critic"]))
    credit = loop.algorithm.credit(step)
    assert credit.returns is not None
    step.columns["returns"] = credit.returns
    found = batches(loop, step, credit, keep)
    before = copies(policy)
    loop.learner.learn(found, whole(step), Averages())
    assert moved(before, policy) == policys
    before, head = copies(policy), critic.head.weight.clone()
    critic.learn(found, whole(step), Averages())
    assert moved(before, policy) == critics
    assert not critic.head.weight.equal(head)
    assert len(gradients["policy"]) == 42 and min(gradients["policy"]) > 0
    assert len(gradients["critic"]) == 44 and min(gradients["critic"]) > 0
    assert isinstance(policy.model, PeftModel) and policy.model.active_adapter == "default"
    assert set(policy.trainable) == policys


def test_a_whole_update_gives_the_promised_metrics_and_lowers_the_value_loss() -> None:
    loop, _, step = made_up()
    keep, losses, metrics = torch.ones(8, dtype=torch.bool), [], {}
    for _ in range(8):
        loop.measure(step, keep)
        metrics = updated(loop, step, loop.algorithm.credit(step), keep)
        losses.append(metrics["value/loss"])
    assert {"value/loss", "value/explained_variance", "value/mean"} <= metrics.keys()
    assert losses[-1] < 0.5 * losses[0]
    values, returns = step.columns["values"].double(), step.columns["returns"].double()
    assert metrics["value/mean"] == pytest.approx(values.mean().item(), abs=1e-6)
    assert metrics["value/explained_variance"] == pytest.approx(
        (1 - (returns - values).var() / returns.var()).item(), abs=1e-5
    )


def test_micro_batches_change_no_update() -> None:
    after = []
    for budget in (10_000, 30):
        _, critic, step = made_up()
        step.columns["returns"] = torch.linspace(-1, 1, len(step.sample))
        weights = torch.ones(len(step.sample))
        found = list(pack(step, torch.ones(8, dtype=torch.bool), weights, budget))
        assert (len(found) == 1) == (budget == 10_000)
        norms: list[float] = []
        critic.optimizer.step = recorded_gradients(critic.optimizer, norms)
        critic.learn(found, whole(step), Averages())
        after.append(torch.tensor(norms))
    assert torch.allclose(*after, rtol=1e-4)


def test_it_starts_from_the_adapter_that_the_policy_starts_from(tmp_path: Path) -> None:
    loop, _, step = made_up()
    save(loop.policy, tmp_path)
    config = PPOConfig(model_name_or_path="nanorlhf:adder", adapter_name_or_path=str(tmp_path), device="cpu")
    policy = Policy(config)
    critic = Critic(config, policy)
    batch = next(pack(step, torch.ones(8, dtype=torch.bool), torch.ones(len(step.sample)), 10_000))
    with torch.no_grad(), critic.active():
        mine = critic.features(batch)
    with torch.no_grad():
        assert mine.equal(policy.hidden(batch)[batch.predict_at])
        assert not critic.values(batch).any()


@pytest.mark.parametrize("model", [None, "nanorlhf:adder"])
def test_dropout_is_on_in_updates_only(model: str | None) -> None:
    loop, critic, step = made_up(critic_model_name_or_path=model, lora_dropout=0.5)
    batch = next(pack(step, torch.ones(8, dtype=torch.bool), torch.ones(len(step.sample)), 10_000))
    with torch.no_grad():
        assert critic.values(batch).equal(critic.values(batch))
        with critic.body.training():
            assert not critic.values(batch).equal(critic.values(batch))
    updated(loop, step, loop.algorithm.credit(step), torch.ones(8, dtype=torch.bool))
    assert not any(m.training for body in (critic.body, loop.policy) for m in body.model.modules())


def test_dropout_is_on_in_the_policys_second_update_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's first one, on the same base, has come between."""
    loop, _, step = made_up(lora_dropout=0.5, updates_per_step=2)
    loop.measure(step, torch.ones(8, dtype=torch.bool))
    backward, training = loop.learner.backward, list[bool]()

    def noted(*given: Any) -> float:
        training.append(any(m.training for m in loop.policy.model.modules()))
        return backward(*given)

    monkeypatch.setattr(loop.learner, "backward", noted)
    updated(loop, step, loop.algorithm.credit(step), torch.ones(8, dtype=torch.bool))
    assert training == [True, True]


@pytest.mark.parametrize("lora", ["all-linear", "none"])
def test_a_model_of_its_own(lora: str) -> None:
    loop, critic, step = made_up(critic_model_name_or_path="nanorlhf:adder", lora=lora)
    keep = torch.ones(8, dtype=torch.bool)
    policy, own = copies(loop.policy), copies(critic.body)
    credit = loop.algorithm.credit(step)
    step.columns["returns"] = credit.returns  # type: ignore[assignment]
    critic.learn(batches(loop, step, credit, keep), whole(step), Averages())
    assert not moved(policy, loop.policy)
    learned = moved(own, critic.body)
    assert learned and all(("lora_" in name) == (lora != "none") for name in learned)
    state, (_, other, _) = critic.state_dict(), made_up(critic_model_name_or_path="nanorlhf:adder", lora=lora)
    other.load_state_dict(state)
    assert all(p.equal(critic.weights[name]) for name, p in other.weights.items())


def test_a_critic_that_cannot_be_is_refused() -> None:
    base: dict[str, Any] = {"model_name_or_path": "nanorlhf:adder", "device": "cpu"}
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    check_critic(PPOConfig(**base, critic_model_name_or_path="nanorlhf:adder"), tokenizer)
    with pytest.raises(UsageError, match="critic_model_name_or_path='/nowhere' cannot be loaded"):
        check_critic(PPOConfig(**base, critic_model_name_or_path="/nowhere"), tokenizer)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_tokens(["another"])
    with pytest.raises(UsageError, match="another vocabulary"):
        check_critic(PPOConfig(**base, critic_model_name_or_path="nanorlhf:adder"), tokenizer)
    with pytest.raises(UsageError, match="cannot share the base"):
        PPOConfig(**base, lora="none")


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 7, returns) == 1  # a constant is not variance
    assert explained_variance(torch.zeros(4), returns) == 0
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0, 3.0]), returns) == pytest.approx(1 - 0.25 / (5 / 3))
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(torch.zeros(4), torch.ones(4)) is None
    assert explained_variance(torch.zeros(1), torch.ones(1)) is None
