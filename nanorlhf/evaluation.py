"""Rewards and losses on prompts that are never trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanorlhf.algorithm import Samples
from nanorlhf.engines.base import Sampling
from nanorlhf.learning.learner import PolicyLearner
from nanorlhf.learning.passes import Passes
from nanorlhf.rollouts.sampler import Sampler
from nanorlhf.rollouts.source import shared
from nanorlhf.system.seeds import derive
from nanorlhf.types import Prompt, Rollout, Sample


def evaluate(
    sampler: Sampler, prompts: Sequence[Prompt], seed: int, sampling: Sampling | None = None
) -> tuple[dict[str, float], list[Sample]]:
    """Mean rewards of one completion for each prompt; the seed is the same each time, so only the weights differ."""
    samples, _ = sampler.write(prompts, Samples(1), derive(seed, "evaluation"), sampling)
    sampler.scorer.finish(samples)
    samples = shared(samples)
    metrics = {"eval/reward": mean_scored([s.reward for s in samples])}
    names = samples[0].rewards.keys()
    if len(names) > 1:
        metrics |= {f"eval/{name}": mean_scored([s.rewards[name] for s in samples]) for name in names}
    metrics["eval/length_mean"] = sum(len(s.completion_ids) for s in samples) / len(samples)
    return metrics, samples


def mean_scored(values: Sequence[float | None]) -> float:
    """The mean of what could be scored."""
    scored = [v for v in values if v is not None]
    return sum(scored) / len(scored) if scored else float("nan")


def held_out_loss(learner: PolicyLearner, passes: Passes, rollout: Rollout, weights: Tensor) -> dict[str, float | None]:
    """The loss, and what it says of itself, on answers that are never trained on, whose tokens weigh `weights (N,)`."""
    everything = torch.ones(len(rollout.samples), dtype=torch.bool)
    for attempt in passes.attempts("evaluation", rollout, everything, weights, learner.algorithm.together):
        with attempt as rows:
            total, figures = learner.loss(rows)
            return {"eval/loss": total} | {f"eval/{name}": mean for name, mean in figures.metrics(()).items()}
    raise AssertionError("the last attempt succeeds, or fails with an error")
