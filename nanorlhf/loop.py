"""The training step, top to bottom."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nanorlhf.algorithm import Algorithm
from nanorlhf.config.training import TrainConfig
from nanorlhf.engines.base import Engine
from nanorlhf.learning.critic import Critic, explained_variance
from nanorlhf.learning.optimizer import Optimizer, sound
from nanorlhf.learning.packing import divided, idle, pack, token_weights
from nanorlhf.learning.passes import TOKENS, Budget, R, in_one_go
from nanorlhf.memory.rehearsal import rehearse
from nanorlhf.memory.residency import Residency
from nanorlhf.policy.policy import Policy
from nanorlhf.records.metrics import Averages, Clock, rollout_metrics
from nanorlhf.records.skipped_updates import describe
from nanorlhf.rollouts.source import Source
from nanorlhf.scoring.reward import TrainerState
from nanorlhf.scoring.scorer import Scorer
from nanorlhf.system.distributed import team
from nanorlhf.types import Credit, Fault, MicroBatch, Progress, Rollout, Step

MISMATCH_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # nats a token; more, and the engine is not the policy
AVERAGED = ("kl", "entropy", "clip_fraction", "mismatch/mean_abs", "mismatch/max_abs")


class Loop:
    """Everything a step needs, and the step."""

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
        plan = self.residency.plan
        fitting = plan.tokens if plan else TOKENS[policy.device.type]
        self.budget = Budget(fitting if config.token_budget == "auto" else config.token_budget)
        self.optimizer = Optimizer(config, policy.trainable.values(), config.learning_rate, policy.device)
        if plan and plan.recompute:
            for body in self.bodies:
                body.recompute(plan.share)
        self.faults: list[Fault] = []
        self.reuses_rollout = config.updates * config.epochs > 1

    @property
    def token_budget(self) -> int:
        """Tokens in a micro-batch."""
        return self.budget.tokens

    @property
    def bodies(self) -> list[Policy]:
        """The policy, and the critic's own model if it has one."""
        return [self.policy, self.critic.body] if self.critic and not self.critic.shares_base else [self.policy]

    @property
    def optimizers(self) -> list[Optimizer]:
        """The policy's, and the critic's."""
        return [self.optimizer, self.critic.optimizer] if self.critic else [self.optimizer]

    def moments(self) -> list[Tensor]:
        """What the optimizers remember of past gradients."""
        return [t for optimizer in self.optimizers for t in optimizer.moments()]

    def probe(self) -> list[str]:
        """Before training on CUDA, where the budget is ours to choose: lowers it until the longest samples fit."""
        if self.policy.device.type != "cuda" or self.config.token_budget != "auto" or self.config.shard_base:
            return []
        with self.residency.phase("update"):
            rehearse(self)
        return self.budget.told()

    def step(self, step: int, progress: Progress = lambda tokens: None) -> Step:
        """Samples, rewards, credit, updates, new weights for the engine."""
        clock, self.faults = Clock(), []
        warnings = self.stale()
        if self.scorer:
            self.scorer.state = TrainerState(step - 1, self.config.max_steps)
        rollout = self.source.rollout(step, clock, progress)
        dropped = self.algorithm.drop(rollout)
        with clock("measure"), self.residency.phase("measure"):
            self.measure(rollout, ~dropped & ~rollout.rewards.isnan())
        credit = self.algorithm.credit(rollout)
        with clock("update"), self.residency.phase("update"):
            updated = self.update(rollout, credit, credit.keep & ~dropped)
        self.algorithm.observe(updated)
        if self.algorithm.refreshes_reference(step):
            self.policy.keep_reference()
        if self.engine:
            with clock("sync"), self.residency.phase("generate"):
                if self.engine.version != self.policy.version:  # who was away is up to date
                    self.engine.update(self.policy)
        metrics = {"step": step} | rollout_metrics(rollout) | updated
        metrics["samples/dropped_fraction"] = dropped.float().mean().item()
        warnings += self.budget.told() + (self.engine.told() if self.engine else [])
        if self.scorer:
            noted, failures = self.scorer.report()
            metrics |= noted
            warnings += failures
        metrics |= clock.metrics(rollout.written or updated["tokens/trained"], len(rollout.samples))
        metrics["memory/token_budget"] = self.token_budget
        metrics |= self.residency.metrics()
        metrics["mismatch/limit"] = MISMATCH_LIMIT[self.policy.compute_dtype] if self.engine else None
        return Step(rollout, credit, metrics, warnings, self.faults)

    def fit(self, phase: str, rollout: Rollout, chosen: Tensor, work: Callable[[], R], together: int = 1) -> R:
        """What `work` makes of the samples `chosen (S,)`: all of it again, in smaller rows, where memory runs out."""
        version, index = self.policy.version, self.share(rollout, chosen, together).nonzero().flatten().tolist()
        sizes = [rollout.samples[i].row_length for i in index]
        lengths = [sum(sizes[i : i + together]) for i in range(0, len(sizes), together)] or [0]

        def undo() -> None:
            self.clear()
            self.policy.version = version

        if self.config.shard_base:
            return in_one_go(phase, work)
        return self.budget.fit(phase, [max(lengths)] if self.policy.one_per_row else lengths, work, undo)

    def share(self, rollout: Rollout, chosen: Tensor, together: int = 1) -> Tensor:
        """(S,) this process's part of the samples `chosen (S,)`."""
        here = team()
        return chosen if here.size == 1 else divided(rollout, chosen, here.size, together)[here.rank]

    def in_step(self, rollout: Rollout, rows: Iterable[MicroBatch]) -> list[MicroBatch]:
        """These rows; where a layer comes from all processes for each of them, idle ones until all have as many."""
        mine = list(rows)
        if not self.config.shard_base:
            return mine
        return mine + [idle(rollout)] * (max(team().gathered(len(mine))) - len(mine))

    def clear(self) -> None:
        """Forgets gradients."""
        for optimizer in self.optimizers:
            optimizer.clear()

    @torch.no_grad()
    def measure(self, rollout: Rollout, chosen: Tensor) -> None:
        """Adds the columns that the algorithm needs, and old log-probabilities for rollouts of several updates."""
        needs = self.algorithm.needs | ({"logprobs"} if self.reuses_rollout else set())
        for name in sorted(needs):
            rollout.columns |= self.fit("measure", rollout, chosen, partial(self.column, name, rollout, chosen))
        if self.reuses_rollout:
            rollout.columns["old_logprobs"] = rollout.columns["logprobs"]

    def column(self, name: str, rollout: Rollout, chosen: Tensor) -> dict[str, Tensor]:
        """(N,) what is measured of the samples `chosen (S,)`, 0 for the tokens of others."""
        names = {"logprobs": ("logprobs", "entropy")}.get(name, (name,))
        empty = torch.zeros(int(rollout.lengths.sum()))
        columns = {n: empty.clone() for n in names}
        mine = self.share(rollout, chosen)
        rows = pack(rollout, mine, empty, self.token_budget, self.policy.one_per_row)
        for batch in self.in_step(rollout, rows):
            for n, values in zip(names, self.measured(name, batch.to(self.policy.device)), strict=True):
                columns[n][batch.tokens] = values.cpu()
        team().add_up(columns.values())
        return columns

    def measured(self, name: str, batch: MicroBatch) -> tuple[Tensor, ...]:
        """(N,) log-probabilities and entropy of the policy as it is, log-probabilities of the reference, or values."""
        if name == "logprobs":
            return self.policy.logprobs(batch)
        if name == "values":
            assert self.critic is not None
            return (self.critic.values(batch),)
        with self.policy.reference() as model:
            return self.policy.logprobs(batch, model)[:1]

    def update(self, rollout: Rollout, credit: Credit, trained: Tensor) -> dict[str, Any]:
        """The optimizer steps that a rollout gives; `trained (S,)` are the samples that pass through the model."""
        averages, losses, norms, tokens = Averages(), [], [], 0
        rate = self.optimizer.learning_rate
        if credit.returns is not None:
            rollout.columns["returns"] = credit.returns
        with self.policy.training():
            for epoch, part in product(range(self.config.epochs), parts(rollout, self.config.updates)):
                chosen, together = trained & part, self.algorithm.together
                cut = partial(self.batches, rollout, credit, chosen, credit.keep & part)
                taught = partial(self.taught, cut, averages, epoch == 0, bool(chosen.any()))
                loss, norm, seen = self.fit("update", rollout, chosen, taught, together)
                tokens += int(rollout.lengths[chosen].sum())
                if self.took("policy", loss, norm, rollout, chosen):
                    averages = seen
                    losses.append(loss)
                    norms.append(norm)
                if self.critic is not None:
                    taught = partial(self.critic_taught, self.critic, cut, int(rollout.lengths[chosen].sum()), averages)
                    loss, norm, seen = self.fit("critic", rollout, chosen, taught, together)
                    averages = seen if self.took("critic", loss, norm, rollout, chosen) else averages
        averages = averages.joined()
        if {"logprobs", "ref_logprobs"} <= rollout.columns.keys() and "kl" not in averages.sums:
            averages.add("kl", self.algorithm.divergence(rollout)[trained[rollout.sample]])
        means = averages.metrics(AVERAGED)
        if self.critic is not None:
            values, returns = (rollout.columns[name][trained[rollout.sample]] for name in ("values", "returns"))
            means["value/explained_variance"] = explained_variance(values, returns)
        updates = {"loss": mean(losses), "grad_norm": mean(norms), "learning_rate": rate}
        updates["updates/left_out"] = len(self.faults)
        return updates | means | {"kl_coef": self.algorithm.kl_coef, "tokens/trained": tokens}

    def took(self, whose: str, loss: float, norm: float, rollout: Rollout, chosen: Tensor) -> bool:
        """Whether an update was taken; one whose numbers were not finite was not, and is written down."""
        if sound(loss, norm):
            return True
        self.faults.append(describe(whose, loss, norm, rollout, chosen))
        return False

    def taught(
        self, cut: Callable[[], list[MicroBatch]], averages: Averages, measured: bool, teaches: bool
    ) -> tuple[float, float, Averages]:
        """One update's loss and gradient norm, and figures that hold it too; those given stay, should it break off."""
        averages = copy.deepcopy(averages)
        return *self.optimize(cut(), averages, measured, teaches), averages

    def critic_taught(
        self, critic: Critic, cut: Callable[[], list[MicroBatch]], tokens: int, averages: Averages
    ) -> tuple[float, float, Averages]:
        """The same of the critic."""
        averages = copy.deepcopy(averages)
        return *critic.update(cut(), tokens, averages), averages

    def batches(self, rollout: Rollout, credit: Credit, trained: Tensor, counted: Tensor) -> list[MicroBatch]:
        """One update's micro-batches: weights over all that counts, rows of what passes through the model here."""
        weights = token_weights(rollout.lengths, counted, self.algorithm.norm, self.config.max_completion_length)
        rollout.columns["advantages"] = self.algorithm.shape(credit.advantages, rollout, trained[rollout.sample])
        one, together = self.policy.one_per_row, self.algorithm.together
        mine = self.share(rollout, trained, together)
        return self.in_step(rollout, pack(rollout, mine, weights, self.token_budget, one, together))

    def optimize(
        self, batches: list[MicroBatch], averages: Averages, measured: bool, teaches: bool
    ) -> tuple[float, float]:
        """One optimizer step; without a gradient (no sample can teach) it leaves the weights as they are."""
        mine = sum(self.backward(batch.to(self.policy.device), averages, measured) for batch in batches)
        self.policy.version += teaches  # before the step: one that breaks off in the middle is no version to keep
        total, norm = self.optimizer.step(mine)
        self.policy.version -= teaches and not sound(total, norm)
        return total, norm

    def backward(self, batch: MicroBatch, averages: Averages, measured: bool) -> float:
        """Adds one micro-batch's gradient, and its figures."""
        logprobs, entropy = self.policy.logprobs(batch, entropy_grad=self.algorithm.entropy_grad)
        if not len(batch.targets):  # idle: for the others' sake it goes back through the layers
            logprobs.sum().backward()
            return 0.0
        old = batch.columns.setdefault("old_logprobs", logprobs.detach())
        loss = self.algorithm.loss(logprobs, entropy, batch)
        weighted = (batch.weights * loss.tokens).sum()
        weighted.backward()
        for name, values in {"entropy": entropy, **loss.stats}.items():
            averages.add(name, values)
        if measured and "engine_logprobs" in batch.columns:
            gap = (old - batch.columns["engine_logprobs"]).abs()
            averages.add("mismatch/mean_abs", gap)
            averages.peak("mismatch/max_abs", gap)
        return weighted.item()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know beside the weights."""
        parts = {"optimizer": self.optimizer, "algorithm": self.algorithm}
        parts |= {"critic": self.critic} if self.critic else {}
        lowered = self.token_budget if self.budget.lowered else None
        own = {"version": self.policy.version, "token_budget": lowered}
        return {name: part.state_dict() for name, part in parts.items()} | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.algorithm.load_state_dict(state["algorithm"])
        if self.critic:
            self.critic.load_state_dict(state["critic"])
        self.policy.version = state["version"]
        if state["token_budget"] is not None:
            self.budget.tokens, self.budget.lowered = min(self.token_budget, state["token_budget"]), True

    def stale(self) -> list[str]:
        """Says so where the engine serves other weights than the policy has."""
        if self.engine is None or self.engine.version == self.policy.version:
            return []
        served, current = self.engine.version, self.policy.version
        return [f"the engine is stale: it serves version {served} of the weights, the policy is at {current}"]


def mean(values: list[float]) -> float | None:
    """None where there are none."""
    return sum(values) / len(values) if values else None


def parts(rollout: Rollout, updates: int) -> Iterator[Tensor]:
    """(S,) masks that cut a rollout into disjoint sets of whole groups."""
    groups = int(rollout.group.max()) + 1
    part = rollout.group * updates // groups
    for u in range(updates):
        yield part == u
