"""The training step, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, get_scheduler

from nanorlhf.algorithm import Algorithm
from nanorlhf.config import TrainConfig
from nanorlhf.data import Prompts
from nanorlhf.engines.base import Engine
from nanorlhf.metrics import Averages, Clock, peak_gib, rollout_metrics
from nanorlhf.packing import pack, token_weights
from nanorlhf.policy import Policy
from nanorlhf.rollout import collect
from nanorlhf.scoring import Reward
from nanorlhf.seeds import derive
from nanorlhf.types import Credit, MicroBatch, Rollout

TOKENS = {"cpu": 4096, "mps": 4096, "cuda": 16384}  # in a micro-batch, where token_budget is auto
MISMATCH_LIMIT = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.15,
}  # nats a token; more means that the engine is not the policy
AVERAGED = ("kl", "entropy", "clip_fraction", "mismatch/mean_abs", "mismatch/max_abs")


@dataclass(slots=True)
class Step:
    """What came of a step: numbers for the log, words for the user."""

    rollout: Rollout
    credit: Credit
    metrics: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


class Loop:
    """Everything a step needs, and the step."""

    def __init__(
        self,
        config: TrainConfig,
        algorithm: Algorithm,
        policy: Policy,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        rewards: list[Reward],
    ) -> None:
        self.config, self.algorithm, self.policy, self.engine = config, algorithm, policy, engine
        self.tokenizer, self.prompts, self.rewards = tokenizer, prompts, rewards
        self.token_budget = TOKENS[policy.device.type] if config.token_budget == "auto" else config.token_budget
        self.optimizer, self.scheduler = make_optimizer(config, policy)
        self.reuses_rollout = config.updates_per_step * config.epochs_per_step > 1

    def step(self, step: int, progress: Callable[[int], None] = lambda tokens: None) -> Step:
        """Prompts, completions, rewards, credit, updates, new weights for the engine."""
        clock = Clock()
        warnings = self.stale()
        prompts = self.prompts.batch(step - 1, self.config.prompts_per_step)
        rollout = collect(
            self.engine, self.tokenizer, prompts, self.algorithm.plan(), self.rewards,
            derive(self.config.seed, "step", step), clock, progress,
        )  # fmt: skip
        if self.config.engine_sleep:
            self.engine.sleep()
        dropped = self.algorithm.drop(rollout)
        with clock("measure"):
            self.measure(rollout, ~dropped & ~rollout.rewards.isnan())
        credit = self.algorithm.credit(rollout)
        with clock("update"):
            updated = self.update(rollout, credit, credit.keep & ~dropped)
        with clock("sync"):
            self.engine.wake()
            self.engine.update(self.policy)
        metrics = {"step": step} | rollout_metrics(rollout, self.rewards) | updated
        metrics |= clock.metrics(metrics["tokens/rollout"], len(rollout.samples))
        metrics["memory/peak_gib"] = peak_gib(self.policy.device)
        return Step(rollout, credit, metrics, warnings + self.disagreement(metrics))

    @torch.no_grad()
    def measure(self, rollout: Rollout, chosen: Tensor) -> None:
        """Adds the columns that the algorithm needs, and old log-probabilities where a rollout gives several updates."""
        needs = self.algorithm.needs | ({"logprobs"} if self.reuses_rollout else set())
        models: dict[str, Callable[[MicroBatch], Tensor]] = {
            "logprobs": self.logprobs,
            "ref_logprobs": self.ref_logprobs,
        }
        for name in sorted(needs):
            column = torch.zeros(int(rollout.lengths.sum()))
            for batch in pack(rollout, chosen, column, self.token_budget, self.policy.one_per_row):
                column[batch.tokens] = models[name](batch.to(self.policy.device)).cpu()
            rollout.columns[name] = column
        if self.reuses_rollout:
            rollout.columns["old_logprobs"] = rollout.columns["logprobs"]

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """(N,) of the policy as it is."""
        return self.policy.logprobs(batch)[0]

    def ref_logprobs(self, batch: MicroBatch) -> Tensor:
        """(N,) of the reference."""
        with self.policy.reference() as model:
            return self.policy.logprobs(batch, model)[0]

    def update(self, rollout: Rollout, credit: Credit, trained: Tensor) -> dict[str, Any]:
        """The optimizer steps that a rollout gives; `trained (S,)` are the samples that pass through the model."""
        rollout.columns["advantages"] = credit.advantages
        averages, losses, norms, tokens = Averages(), [], [], 0
        rate = self.scheduler.get_last_lr()[0]
        self.policy.model.train()
        for epoch in range(self.config.epochs_per_step):
            for part in parts(rollout, self.config.updates_per_step):
                weights = token_weights(
                    rollout.lengths, credit.keep & part, self.algorithm.norm, self.config.max_completion_length
                )
                batches = list(pack(rollout, trained & part, weights, self.token_budget, self.policy.one_per_row))
                loss, norm = self.optimize(batches, averages, measured=epoch == 0)
                losses.append(loss)
                norms.append(norm)
                tokens += sum(len(b.targets) for b in batches)
        self.policy.model.eval()
        means = averages.metrics(AVERAGED)
        updates = {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms), "learning_rate": rate}
        return updates | means | {"tokens/trained": tokens}

    def optimize(self, batches: list[MicroBatch], averages: Averages, measured: bool) -> tuple[float, float]:
        """One optimizer step; where no sample can teach, weights stay as they are."""
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            total += self.backward(batch.to(self.policy.device), averages, measured)
        norm = 0.0
        if batches:
            norm = torch.nn.utils.clip_grad_norm_(self.policy.trainable.values(), self.config.max_grad_norm).item()
            self.optimizer.step()
            self.policy.version += 1
        self.scheduler.step()
        return total, norm

    def backward(self, batch: MicroBatch, averages: Averages, measured: bool) -> float:
        """Adds one micro-batch's gradient, and its figures."""
        logprobs, entropy = self.policy.logprobs(batch)
        old = batch.columns.setdefault("old_logprobs", logprobs.detach())
        loss = self.algorithm.loss(logprobs, entropy, batch)
        weighted = (batch.weights * loss.tokens).sum()
        weighted.backward()
        for name, values in {"entropy": entropy, **loss.stats}.items():
            averages.add(name, values)
        if measured:
            gap = (old - batch.columns["engine_logprobs"]).abs()
            averages.add("mismatch/mean_abs", gap)
            averages.peak("mismatch/max_abs", gap)
        return weighted.item()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know beside the weights."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "algorithm": self.algorithm}
        return {name: part.state_dict() for name, part in parts.items()} | {"version": self.policy.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.policy.version = state["version"]

    def stale(self) -> list[str]:
        """Says so where the engine serves other weights than the policy has."""
        served, current = self.engine.version, self.policy.version
        if served == current:
            return []
        return [f"the engine is stale: it serves version {served} of the weights, the policy is at {current}"]

    def disagreement(self, metrics: dict[str, Any]) -> list[str]:
        """Says so where engine and trainer give the same tokens different probabilities."""
        gap, limit = metrics["mismatch/mean_abs"], MISMATCH_LIMIT[self.policy.compute_dtype]
        if gap is None or gap <= limit:
            return []
        return [
            f"engine and trainer disagree by {gap:.3g} nats a token (more than {limit:g}): the engine is stale or computes otherwise"
        ]


def parts(rollout: Rollout, updates: int) -> Iterator[Tensor]:
    """(S,) masks that cut a rollout into disjoint sets of whole groups."""
    groups = int(rollout.group.max()) + 1
    part = rollout.group * updates // groups
    for u in range(updates):
        yield part == u


def make_optimizer(config: TrainConfig, policy: Policy) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW over what is trained, and the course of its learning rate."""
    optimizer = torch.optim.AdamW(
        policy.trainable.values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    cosine = config.lr_scheduler_type == "cosine"
    scheduler = get_scheduler(
        "cosine_with_min_lr"
        if cosine
        else "constant_with_warmup"
        if config.lr_scheduler_type == "constant"
        else "linear",
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps * config.updates_per_step * config.epochs_per_step,
        scheduler_specific_kwargs={"min_lr_rate": config.lr_min_ratio} if cosine else None,
    )
    return optimizer, scheduler
