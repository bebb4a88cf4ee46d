"""How good is it on prompts it never trained on?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanorlhf.algorithm import Samples
from nanorlhf.engines.base import Sampling
from nanorlhf.loop import Loop
from nanorlhf.records.metrics import Averages
from nanorlhf.rollouts.sampler import Author
from nanorlhf.rollouts.source import shared
from nanorlhf.system.distributed import team
from nanorlhf.system.seeds import derive
from nanorlhf.types import Prompt, Rollout, Sample


def evaluate(
    author: Author, prompts: Sequence[Prompt], seed: int, sampling: Sampling | None = None
) -> tuple[dict[str, float], list[Sample]]:
    """Mean rewards of one completion for each prompt; the seed is the same each time, so only the weights differ."""
    samples, _ = author.write(prompts, Samples(1), derive(seed, "evaluation"), sampling)
    author.scorer.finish(samples)
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


@torch.no_grad()
def judged(loop: Loop, rollout: Rollout) -> dict[str, float | None]:
    """The loss, and what it says of itself, on answers that were never trained on; measures them the first time."""
    everything = torch.ones(len(rollout.samples), dtype=torch.bool)
    if not rollout.columns:
        loop.measure(rollout, everything)

    def judge() -> dict[str, float | None]:
        averages, total = Averages(), 0.0
        for batch in loop.batches(rollout, loop.algorithm.credit(rollout), everything, everything):
            here = batch.to(loop.policy.device)
            logprobs, entropy = loop.policy.logprobs(here)
            if not len(here.targets):
                continue
            loss = loop.algorithm.loss(logprobs, entropy, here)
            total += (here.weights * loss.tokens).sum().item()
            for name, values in loss.stats.items():
                averages.add(name, values)
        loss = torch.tensor([total], dtype=torch.double)
        team().add_up([loss])
        averages = averages.joined()
        return {"eval/loss": loss.item()} | {f"eval/{name}": mean for name, mean in averages.metrics(()).items()}

    return loop.fit("evaluation", rollout, everything, judge, loop.algorithm.together)
