"""Six algorithms on made-up rollouts: what each token earns, what is refused, and how little tells them apart."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nanorlhf.algorithm import OnPolicy, Samples
from nanorlhf.config.training import OnPolicyConfig
from nanorlhf.errors import UsageError
from nanorlhf.grpo import GRPO, GRPOConfig
from nanorlhf.ppo import PPO, PPOConfig
from nanorlhf.raft import RAFT, RAFTConfig
from nanorlhf.reinforce import REINFORCE, REINFORCEConfig
from nanorlhf.remax import ReMax, ReMaxConfig
from nanorlhf.rloo import RLOO, RLOOConfig
from nanorlhf.segments import Segments
from nanorlhf.types import MicroBatch, Rollout
from tests.samples import expect_close, rollout, sample

ROOT = Path(__file__).parents[1]
FOLDERS = ["grpo", "ppo", "rloo", "remax", "raft", "reinforce"]


def made_up(rewards: list[float], lengths: list[int], group_size: int, **columns: list[float]) -> Rollout:
    step = rollout([sample(2, n, seed=i) for i, n in enumerate(lengths)], group_size)
    step.rewards = torch.tensor(rewards)
    step.columns |= {name: torch.tensor(values) for name, values in columns.items()}
    return step


def test_rloo_takes_the_kl_off_the_reward() -> None:
    step = made_up([6.0, 3.0], [2, 1], 2, logprobs=[-1.0, -1.0, -2.0], ref_logprobs=[-2.0, -1.5, -2.0])
    credit = RLOO(RLOOConfig(kl_coef=0.1)).credit(step)  # the first costs .1 (1 + .5)
    expect_close(credit.advantages, [2.85, 2.85, -2.85])


def test_remax_uses_the_greedy_reward_and_kl_to_go() -> None:
    step = made_up([1.0, 0.0], [2, 1], 1, logprobs=[-1.0, -1.0, -2.0], ref_logprobs=[-2.0, -1.5, -2.0])
    step.baselines = torch.tensor([0.25, float("nan")])
    algorithm = ReMax(ReMaxConfig(kl_coef=0.1))
    credit = algorithm.credit(step)
    assert algorithm.samples() == Samples(1, greedy=True)
    expect_close(credit.advantages[:2], [1 - 0.25 - 0.15, 1 - 0.25 - 0.05])
    assert credit.keep.tolist() == [True, False]  # without its baseline a sample says nothing


@pytest.mark.parametrize(
    ("baseline", "want"), [("none", [1.0, 1, 0]), ("mean", [0.5, 0.5, -0.5]), ("greedy", [0.7, 0.7, -1])]
)
def test_reinforce_baselines(baseline: str, want: list[float]) -> None:
    step = made_up([1.0, 0.0], [2, 1], 1)
    step.baselines = torch.tensor([0.3, 1.0])
    expect_close(REINFORCE(REINFORCEConfig(kl_coef=0.0, baseline=baseline)).credit(step).advantages, want)  # type: ignore[arg-type]


@pytest.mark.parametrize("baseline", ["mean", "ema"])
def test_whitened_a_baseline_that_all_answers_share_is_none(baseline: Any) -> None:
    def shaped(name: Any) -> torch.Tensor:
        step = made_up([1.0, 0.0, 0.25], [2, 1, 3], 1)
        algorithm = REINFORCE(REINFORCEConfig(kl_coef=0.0, baseline=name, whiten_advantages="on"))
        algorithm.average = 0.7
        return algorithm.shape(algorithm.credit(step).advantages, step, torch.ones(6, dtype=torch.bool))

    expect_close(shaped(baseline), shaped("none").tolist())


@pytest.mark.parametrize("whitened", ["on", "off"])
@pytest.mark.parametrize("baseline", ["none", "mean", "group"])
def test_where_all_earn_the_same_reinforce_learns_nothing(baseline: Any, whitened: Any) -> None:
    step = made_up([0.7] * 12, [3] * 12, 4)
    algorithm = REINFORCE(
        REINFORCEConfig(kl_coef=0.0, baseline=baseline, num_generations=4, whiten_advantages=whitened)
    )
    shaped = algorithm.shape(algorithm.credit(step).advantages, step, torch.ones(36, dtype=torch.bool))
    assert shaped.eq(0).all() or (baseline, whitened) == ("none", "off")


def test_the_moving_average_is_read_before_it_takes_the_batch_in() -> None:
    algorithm = REINFORCE(REINFORCEConfig(kl_coef=0.0, baseline="ema"))
    step = made_up([1.0, 0.0], [1, 1], 1)
    for _ in range(2):  # only a step that came to its end counts
        expect_close(algorithm.credit(step).advantages, [1.0, 0.0])
    algorithm.observe({"kl": None})
    expect_close(algorithm.credit(step).advantages, [0.95, -0.05])  # .9 * 0 + .1 * .5
    algorithm.observe({"kl": None})
    again = REINFORCE(REINFORCEConfig(kl_coef=0.0, baseline="ema"))
    again.load_state_dict(algorithm.state_dict())
    expect_close(again.credit(step).advantages, [1 - 0.095, -0.095])


def test_raft_keeps_the_best_and_learns_it() -> None:
    step = made_up([0.0, 1.0, 1.0, 0.0, 0.0, 0.0], [1, 2, 1, 1, 1, 1], 3)
    algorithm = RAFT(RAFTConfig(num_generations=3))
    assert algorithm.credit(step).keep.tolist() == [False, True, False, False, False, False]
    expect_close(algorithm.loss(torch.tensor([-0.5]), torch.zeros(1), None).tokens, [0.5])  # type: ignore[arg-type]
    with_kl = RAFT(RAFTConfig(num_generations=3, kl_coef=0.1))
    step.columns |= {"logprobs": torch.tensor([0.0, 9, 9, 0, 0, 0, 0]), "ref_logprobs": torch.zeros(7)}
    assert with_kl.credit(step).keep.tolist()[:3] == [False, False, True]  # the other paid .1 * 18


def test_raft_picks_the_best_of_those_that_count() -> None:
    step = made_up([3.0, 2.0, 1.0, 1.0, 0.0, float("nan")], [1] * 6, 3)
    for truncated in (0, 3):
        step.samples[truncated].stopped = False
    assert RAFT(RAFTConfig(num_generations=3)).credit(step).keep.tolist() == [True, False, False, True, False, False]
    masking = RAFT(RAFTConfig(num_generations=3, mask_truncated_completions=True))
    assert masking.credit(step).keep.tolist() == [False, True, False, False, False, False]  # one left is no best


def test_ppo_credit_is_gae() -> None:
    step = made_up([3.0], [3], 1, values=[0.5, 1.0, 1.5])
    credit = PPO(PPOConfig(kl_coef=0.0, lam=0.5)).credit(step)
    expect_close(credit.advantages, [0.5 + 0.5 * (0.5 + 0.75), 0.5 + 0.75, 1.5])
    assert credit.returns is not None
    expect_close(credit.returns - credit.advantages, [0.5, 1.0, 1.5])


def test_whitening_is_selective_and_one_option_turns_it() -> None:
    step, chosen = made_up([1.0, 0.0], [2, 1], 1), torch.tensor([True, True, True])
    raw = torch.tensor([1.0, 1.0, 0.0])
    assert REINFORCE(REINFORCEConfig()).shape(raw, step, chosen).mean().abs() < 1e-6
    for algorithm in (
        REINFORCE(REINFORCEConfig(baseline="mean")),
        GRPO(GRPOConfig()),
        PPO(PPOConfig()),
        RLOO(RLOOConfig()),
    ):
        assert algorithm.shape(raw, step, chosen).equal(raw)
    assert GRPO(GRPOConfig(whiten_advantages="on")).shape(raw, step, chosen).mean().abs() < 1e-6
    assert REINFORCE(REINFORCEConfig(whiten_advantages="off")).shape(raw, step, chosen).equal(raw)
    some = torch.tensor([True, False, True])
    expect_close(
        REINFORCE(REINFORCEConfig()).shape(raw, step, some), [0.70711, 1.0, -0.70711]
    )  # others stay as they are


def test_only_uncertain_tokens_earn() -> None:
    step = made_up([1.0], [4], 1, entropy=[0.1, 0.9, 0.5, 0.2])
    shaped = GRPO(GRPOConfig(top_entropy_fraction=0.5)).shape(torch.ones(4), step, torch.ones(4, dtype=torch.bool))
    assert shaped.tolist() == [0, 1, 1, 0]


def test_truncated_completions_leave_the_loss_where_asked() -> None:
    step = made_up([1.0, 0.0], [2, 1], 2)
    step.samples[1].stopped = False
    assert GRPO(GRPOConfig()).credit(step).keep.tolist() == [True, True]
    assert GRPO(GRPOConfig(mask_truncated_completions=True)).credit(step).keep.tolist() == [True, False]


def batch(**columns: list[float]) -> MicroBatch:
    count = len(next(iter(columns.values())))
    empty, flat = torch.zeros(count, dtype=torch.long), {k: torch.tensor(v) for k, v in columns.items()}
    return MicroBatch(empty, empty, Segments.of([]), empty, empty, empty, empty, empty, empty, flat)


def test_loss_options_add_up() -> None:
    made = batch(
        old_logprobs=[-1.0, -2.0], advantages=[1.0, -1.0], ref_logprobs=[-1.1, -2.0], engine_logprobs=[-1.2, -2.0]
    )
    logprobs, entropy = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.25])
    loss = GRPO(GRPOConfig(kl_coef=2.0, entropy_coef=0.1, importance_correction="token")).loss(logprobs, entropy, made)
    weight = torch.tensor(0.2).exp().item()
    expect_close(loss.tokens, [-1.0 * weight - 0.05 + 2 * weight * 0.0048374, 1.0 - 0.025])
    expect_close(loss.stats["importance/weight_mean"], [1.22140, 1.0])
    assert loss.stats["importance/cut_fraction"].tolist() == [0, 0]


def test_adaptive_kl_is_remembered() -> None:
    algorithm = GRPO(GRPOConfig(kl_coef=0.1, kl_target=0.01))
    algorithm.observe({"kl": 0.02})
    assert algorithm.kl_coef == pytest.approx(0.102)
    again = GRPO(GRPOConfig(kl_coef=0.1, kl_target=0.01))
    again.load_state_dict(algorithm.state_dict())
    assert again.kl_coef == algorithm.kl_coef
    again.observe({"kl": math.nan})
    assert again.kl_coef == algorithm.kl_coef, "what was not measured steers nothing"
    other = GRPO(GRPOConfig(kl_coef=0.5, kl_target=0.01))
    other.load_state_dict(algorithm.state_dict())
    assert other.kl_coef == 0.5, "an option that was changed counts here, too"
    unsteered = GRPO(GRPOConfig(kl_coef=0.3))
    unsteered.load_state_dict(algorithm.state_dict())
    assert unsteered.kl_coef == 0.3, "an option that was changed counts"


REFUSED: list[tuple[type[OnPolicyConfig], dict[str, Any], str]] = [
    (GRPOConfig, {"num_generations": 1}, "at least 2"),
    (RLOOConfig, {"num_generations": 1}, "at least 2"),
    (RAFTConfig, {"num_generations": 1}, "at least 2"),
    (RAFTConfig, {"kl_in": "loss", "kl_estimator": "k3"}, "picks the best"),
    (RAFTConfig, {"clip_low": 0.1}, "unknown option"),
    (ReMaxConfig, {"dynamic_sampling": 1}, "a group of one answer has no spread"),
    (ReMaxConfig, {"temperature": 0.01}, "nothing is left to compare"),
    (REINFORCEConfig, {"baseline": "greedy", "temperature": 0.01}, "nothing is left to compare"),
    (REINFORCEConfig, {"baseline": "group"}, "2 answers"),
    (REINFORCEConfig, {"ema_beta": 1.0}, "below 1"),
    (GRPOConfig, {"ref_refresh_steps": 5}, "no reference"),
    (GRPOConfig, {"kl_target": 0.1}, "above 0"),
    (GRPOConfig, {"overlong_buffer": 512}, "below max_completion_length"),
    (GRPOConfig, {"dual_clip": 0.5}, "above 1"),
    (GRPOConfig, {"dual_clip": 3.0, "policy_loss": "sapo"}, "no such clip"),
    (PPOConfig, {"lora": "none"}, "critic_model_name_or_path"),
    (PPOConfig, {"gamma": 1.5}, "between 0 and 1"),
]


@pytest.mark.parametrize(("config", "options", "said"), REFUSED)
def test_settings_that_cannot_work_are_refused(
    config: type[OnPolicyConfig], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        config(**options)


def test_the_diff_is_the_idea() -> None:
    grpo, rloo = ((ROOT / name / "algorithm.py").read_text().splitlines() for name in ("grpo", "rloo"))
    changed = [line for line in difflib.unified_diff(grpo, rloo, n=0) if line.startswith("+") and line[1:].strip()]
    assert len(changed) - 1 <= 25
    for name in FOLDERS:
        assert len((ROOT / name / "algorithm.py").read_text().splitlines()) <= 80


def test_the_loop_names_no_algorithm() -> None:
    words = (ROOT / "nanorlhf" / "loop.py").read_text().lower()
    assert not [name for name in FOLDERS if name in words]


def test_every_algorithm_is_one() -> None:
    for algorithm in (GRPO, PPO, RLOO, ReMax, RAFT, REINFORCE):
        assert issubclass(algorithm, OnPolicy)
        assert algorithm.name == algorithm.__name__.lower()
