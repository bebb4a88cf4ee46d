"""An algorithm is three decisions: what to sample, what each token earned, and the loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanorlhf.config.training import Norm, OnPolicyConfig, PolicyGradientConfig, TrainConfig
from nanorlhf.formulas import losses
from nanorlhf.formulas.advantages import reward_to_go, sum_by_sample, token_rewards, whiten
from nanorlhf.formulas.kl import ESTIMATORS, adapted, as_loss
from nanorlhf.types import Credit, MicroBatch, Rollout


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples to draw for each prompt."""

    each: int
    greedy: bool = False


@dataclass(slots=True)
class Loss:
    """Per-token loss, and per-token figures to average over the update."""

    tokens: Tensor  # (N,)
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,)


class Algorithm(ABC):
    """The questions that the loop asks; each algorithm answers those that its idea changes."""

    name: ClassVar[str]
    together = 1  # adjacent samples that must lie in the same row
    norm: Norm = "token"
    kl_coef = 0.0
    entropy_grad = False  # whether the loss holds the entropy

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @property
    def needs(self) -> frozenset[str]:
        """The columns to measure before credit: `logprobs`, `ref_logprobs`, `values`."""
        return frozenset()

    @property
    def answers(self) -> int:
        """Samples of each prompt that it learns from."""
        return self.together

    def drop(self, rollout: Rollout) -> Tensor:
        """(S,) samples that cannot teach and need no forward pass; they still count in the loss's denominator."""
        return torch.zeros(len(rollout.samples), dtype=torch.bool)

    @abstractmethod
    def credit(self, rollout: Rollout) -> Credit:
        """Rewards and what was measured to each token's advantage."""

    def shape(self, advantages: Tensor, rollout: Rollout, chosen: Tensor) -> Tensor:
        """(N,) advantages with the last touches of one update, whose tokens are `chosen (N,)`."""
        return advantages

    @abstractmethod
    def loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Loss:
        """The loss of each token, which the optimizer lowers."""

    def divergence(self, rollout: Rollout) -> Tensor:
        """(N,) each token's estimate of the KL between the policy before its updates and the reference."""
        return rollout.columns["logprobs"] - rollout.columns["ref_logprobs"]

    def refreshes_reference(self, step: int) -> bool:
        """Whether the reference catches up with the policy after this step."""
        return False

    def observe(self, metrics: Mapping[str, Any]) -> None:  # noqa: B027  most algorithms change nothing
        """Adapts the next step to this step's metrics."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run must know."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  and most have no state
        """Takes back what `state_dict` gave."""


class OnPolicy(Algorithm):
    """Learns from its own samples, held near a reference by a KL in the reward or in the loss."""

    config: OnPolicyConfig

    def __init__(self, config: OnPolicyConfig) -> None:
        super().__init__(config)
        self.norm, self.kl_coef = config.norm, config.kl_coef

    @property
    def needs(self) -> frozenset[str]:
        if not self.config.kl_coef:
            return frozenset()
        return frozenset({"logprobs", "ref_logprobs"} if self.config.kl_in == "reward" else {"ref_logprobs"})

    @property
    def answers(self) -> int:
        return self.samples().each

    def samples(self) -> Samples:
        """The number of samples for each prompt, and whether there is a greedy one too."""
        return Samples(self.config.num_generations)

    def counted(self, rollout: Rollout) -> Tensor:
        """(S,) samples that the loss counts: scored, and whole if truncated ones are masked."""
        whole = torch.tensor([s.stopped or not self.config.mask_truncated_completions for s in rollout.samples])
        return ~rollout.rewards.isnan() & whole

    def penalty(self, rollout: Rollout) -> Tensor:
        """(N,) what the KL costs each token's reward."""
        if not (self.kl_coef and self.config.kl_in == "reward"):
            return torch.zeros(int(rollout.lengths.sum()))
        gap = rollout.columns["logprobs"] - rollout.columns["ref_logprobs"]
        return self.kl_coef * ESTIMATORS[self.config.kl_estimator](gap)

    def scores(self, rollout: Rollout) -> Tensor:
        """(S,) rewards less their samples' penalties."""
        return rollout.rewards - sum_by_sample(self.penalty(rollout), rollout.sample, len(rollout.samples))

    def counted_scores(self, rollout: Rollout) -> Tensor:
        """(S,) scores by which to choose among a group's answers: NaN for those that the loss does not count."""
        return self.scores(rollout).masked_fill(~self.counted(rollout), torch.nan)

    def token_rewards(self, rollout: Rollout) -> Tensor:
        """(N,) minus the penalty at each token, the score on the last."""
        return token_rewards(rollout.rewards.nan_to_num(0.0), -self.penalty(rollout), rollout.lengths)

    def returns(self, rollout: Rollout) -> Tensor:
        """(N,) the reward still to come at each token."""
        return reward_to_go(self.token_rewards(rollout), rollout.lengths)

    def refreshes_reference(self, step: int) -> bool:
        return self.config.ref_refresh_steps > 0 and step % self.config.ref_refresh_steps == 0

    def observe(self, metrics: Mapping[str, Any]) -> None:
        kl, target = metrics["kl"], self.config.kl_target
        if target is not None and kl is not None and math.isfinite(kl):
            self.kl_coef = adapted(self.kl_coef, kl, target)

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef, "from": self.config.kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.config.kl_target is not None and state["from"] == self.kl_coef:
            self.kl_coef = state["kl_coef"]  # else what the options say now


class PolicyGradient(OnPolicy):
    """Advantages weigh log-probabilities; the clipped surrogate and its kin are options of one loss."""

    config: PolicyGradientConfig

    def __init__(self, config: PolicyGradientConfig) -> None:
        super().__init__(config)
        self.entropy_grad = config.entropy_coef != 0

    @property
    def has_baseline(self) -> bool:
        """Whether advantages are centred already; whitening is for those that are not."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"logprobs"} if self.config.top_entropy_fraction < 1 else frozenset())

    def shape(self, advantages: Tensor, rollout: Rollout, chosen: Tensor) -> Tensor:
        """Whitens, and leaves the most certain tokens without an advantage (arXiv:2506.01939), if asked for."""
        wanted = self.config.whiten_advantages
        if chosen.any() and (wanted == "on" or (wanted == "auto" and not self.has_baseline)):
            advantages = advantages.masked_scatter(chosen, whiten(advantages[chosen]))
        if chosen.any() and self.config.top_entropy_fraction < 1:
            entropy = rollout.columns["entropy"]
            threshold = torch.quantile(entropy[chosen], 1 - self.config.top_entropy_fraction)
            advantages = torch.where(entropy >= threshold, advantages, 0.0)
        return advantages

    def importance(self, old: Tensor, engine: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) weights that make the engine's samples the trainer's, and where they were cut off."""
        form, cap = self.config.importance_correction, self.config.importance_cap
        return losses.importance(old - engine, sample, form, cap)

    def divergence(self, rollout: Rollout) -> Tensor:
        gap = super().divergence(rollout)
        if self.config.importance_correction == "none":
            return gap
        return gap * self.importance(rollout.columns["logprobs"], rollout.columns["engine_logprobs"], rollout.sample)[0]

    def loss(self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Loss:
        """The surrogate that `policy_loss` names, with what else was asked for."""
        config, columns = self.config, batch.columns
        old, advantages = columns["old_logprobs"], columns["advantages"]
        log_ratio = token_log_ratio = logprobs - old
        if config.policy_loss in ("sequence", "gspo"):
            log_ratio = losses.by_sequence(log_ratio, batch.sample, mean=config.policy_loss == "gspo")
        if config.policy_loss == "cispo":
            tokens = losses.cispo(logprobs, log_ratio, advantages, config.clip_range)
        elif config.policy_loss == "sapo":
            tokens = losses.sapo(log_ratio, advantages, config.sapo_tau_pos, config.sapo_tau_neg)
        else:
            tokens = losses.clipped_surrogate(log_ratio, advantages, config.clip_range, config.dual_clip)
        stats = {"clip_fraction": losses.clipped(log_ratio.detach(), advantages, config.clip_range)}
        weight = torch.ones_like(old)
        if config.importance_correction != "none":
            weight, cut = self.importance(old, columns["engine_logprobs"], batch.sample)
            tokens = tokens * weight
            stats |= {"importance/weight_mean": weight, "importance/cut_fraction": cut}
            if "age" in columns:
                stats["importance/old_weight_mean"] = weight[columns["age"] > 0]
        if config.entropy_coef:
            tokens = tokens - config.entropy_coef * entropy
        if config.kl_coef and config.kl_in == "loss":
            # Ratio and weight make the engine's samples those of the policy of now, whose KL the logged mean estimates.
            kl = weight * as_loss(config.kl_estimator, logprobs - columns["ref_logprobs"], token_log_ratio)
            tokens = tokens + self.kl_coef * kl
            stats["kl"] = kl.detach()
        return Loss(tokens, stats)
