"""The training step, top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

from torch import Tensor

from nanorlhf.algorithm import Algorithm
from nanorlhf.config.training import TrainConfig
from nanorlhf.engines.base import MISMATCH_LIMIT, Engine, refresh
from nanorlhf.learning.critic import Critic
from nanorlhf.learning.learner import Learner, Part, PolicyLearner
from nanorlhf.learning.packing import token_weights
from nanorlhf.learning.passes import Passes
from nanorlhf.learning.update import Update
from nanorlhf.memory.plan import Phase
from nanorlhf.memory.residency import Residency
from nanorlhf.policy.attention import AT_ONCE
from nanorlhf.policy.policy import Policy
from nanorlhf.records.metrics import Clock, rollout_metrics
from nanorlhf.rollouts.source import Source
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.system.terminal import log
from nanorlhf.types import Credit, Progress, Rollout, Step

TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}  # in a micro-batch, if token_budget is auto and nothing was planned


class Loop:
    """One step: sample, measure, credit, update, serve. How rows, memory and processes are used `passes` knows."""

    def __init__(
        self,
        config: TrainConfig,
        algorithm: Algorithm,
        policy: Policy,
        source: Source,
        scorer: Scorer | None = None,
        engine: Engine | None = None,
        critic: Critic | None = None,
        residency: Residency | None = None,
    ) -> None:
        self.config, self.algorithm, self.policy, self.source = config, algorithm, policy, source
        self.scorer, self.engine, self.critic = scorer, engine, critic
        self.residency = residency or Residency(device=policy.device)
        self.learner = PolicyLearner(config, algorithm, policy)
        self.learners: list[Learner] = [self.learner, critic] if critic else [self.learner]
        plan = self.residency.plan
        fitting = plan.tokens if plan else TOKENS[policy.device.type]
        self.passes = Passes(
            fitting if config.token_budget == "auto" else config.token_budget,
            one_per_row=any(learner.body.one_per_row for learner in self.learners),
            at_once=0 if policy.device.type == "cuda" else AT_ONCE,
            in_step=config.shard_base,
            undo=self.clear,
        )
        if plan and plan.recompute:
            for learner in self.learners:
                learner.body.recompute(plan.share)
        self.reuses_rollout = config.updates * config.epochs > 1

    def step(self, number: int, progress: Progress = lambda tokens: None) -> Step:
        """Samples, rewards, credit, updates, new weights for the engine."""
        clock = Clock()
        self.warn_if_stale()
        if self.scorer:
            self.scorer.at(number - 1)
        if self.engine:
            self.engine.pace.clear()
        rollout = self.source.rollout(number, clock, progress)
        dropped = self.algorithm.drop(rollout)
        with self.phase("measure", clock):
            self.measure(rollout, ~dropped & ~rollout.rewards.isnan())
        credit = self.algorithm.credit(rollout)
        with self.phase("update", clock):
            update = self.update(rollout, credit, credit.keep & ~dropped)
        updated = update.metrics(self.algorithm, rollout, credit.keep & ~dropped)
        self.algorithm.observe(updated)
        self.serve(number, clock)
        metrics = {"step": number, "samples/dropped_fraction": dropped.float().mean().item()}
        metrics |= rollout_metrics(rollout) | updated
        metrics |= self.scorer.report() if self.scorer else {}
        scored = rollout.scored or len(rollout.samples)
        metrics |= clock.metrics(rollout.written or updated["tokens/trained"], scored)
        metrics |= {"memory/token_budget": self.passes.tokens} | self.residency.metrics()
        metrics |= self.engine.pace.metrics() if self.engine else {}
        metrics["mismatch/limit"] = MISMATCH_LIMIT[self.policy.compute_dtype] if self.engine else None
        return Step(rollout, credit, metrics, update.skipped)

    @contextmanager
    def phase(self, name: Phase, clock: Clock, timed: str | None = None) -> Iterator[None]:
        """Times a phase, with all on the card that it needs."""
        with clock(timed or name), self.residency.phase(name):
            yield

    def measure(self, rollout: Rollout, chosen: Tensor) -> None:
        """Adds the columns that the algorithm needs, and old log-probabilities for rollouts of several updates."""
        needs = self.algorithm.needs | ({"logprobs"} if self.reuses_rollout else set())
        for name in sorted(needs):
            learner = self.learners[-1] if name == "values" else self.learner
            for attempt in self.passes.attempts("measure", rollout, chosen):
                with attempt as rows:
                    rollout.columns |= learner.measure(name, rows, int(rollout.lengths.sum()))
        if self.reuses_rollout:
            rollout.columns["old_logprobs"] = rollout.columns["logprobs"]

    def update(self, rollout: Rollout, credit: Credit, trained: Tensor) -> Update:
        """Optimizer steps on disjoint sets of whole groups; `trained (S,)` pass through the models."""
        update = Update(self.learner.optimizer.learning_rate)
        rollout.columns |= {} if credit.returns is None else {"returns": credit.returns}
        for epoch, cut in product(range(self.config.epochs), rollout.parts(self.config.updates)):
            chosen = trained & cut
            part = Part(chosen, int(rollout.lengths[chosen].sum()), first=epoch == 0)
            weights = self.weigh(rollout, credit, chosen, credit.keep & cut)
            update.tokens += part.tokens
            for learner in self.learners:
                for attempt in self.passes.attempts(learner.phase, rollout, chosen, weights, self.algorithm.together):
                    with attempt as rows:
                        learned = learner.learn(rows, part, update.averages.copy())
                        update.add(learner, learned, rollout, chosen)
        return update

    def weigh(self, rollout: Rollout, credit: Credit, trained: Tensor, counted: Tensor) -> Tensor:
        """(N,) weights of one update's loss, over all samples that count; its advantages become a column."""
        rollout.columns["advantages"] = self.algorithm.shape(credit.advantages, rollout, trained[rollout.sample])
        return token_weights(rollout.lengths, counted, self.algorithm.norm, self.config.max_completion_length)

    def serve(self, number: int, clock: Clock) -> None:
        """Keeps a new reference if it is time, and gives the engine the new weights."""
        if self.algorithm.refreshes_reference(number):
            self.policy.keep_reference()
        if self.engine:
            with self.phase("generate", clock, "sync"):
                refresh(self.engine, self.policy)  # one that was away is up to date

    def clear(self) -> None:
        """Forgets gradients."""
        for learner in self.learners:
            learner.optimizer.clear()

    def moments(self) -> list[Tensor]:
        """The tensors in which the optimizers keep past gradients."""
        return [t for learner in self.learners for t in learner.optimizer.moments()]

    def state_dict(self, step: int) -> dict[str, Any]:
        """The state that a run resumed after this step must know beside the weights."""
        parts = {"optimizer": self.learner.optimizer, "algorithm": self.algorithm}
        parts |= {"critic": self.critic} if self.critic else {}
        lowered = self.passes.tokens if self.passes.lowered else None
        own = {"version": self.policy.version, "token_budget": lowered, "source": self.source.state_dict(step)}
        return {name: part.state_dict() for name, part in parts.items()} | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.learner.optimizer.load_state_dict(state["optimizer"])
        self.algorithm.load_state_dict(state["algorithm"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
        self.source.load_state_dict(state["source"])
        self.policy.version = state["version"]
        if state["token_budget"] is not None:
            self.passes.tokens, self.passes.lowered = min(self.passes.tokens, state["token_budget"]), True

    def warn_if_stale(self) -> None:
        """Warns if the engine serves other weights than the policy has."""
        if self.engine and self.engine.version != self.policy.version:
            served = f"it serves version {self.engine.version} of the weights, the policy is at {self.policy.version}"
            log.warning(f"the engine is stale: {served}")
