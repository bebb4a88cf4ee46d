"""How good is it on prompts it never trained on?"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nanorlhf.algorithm import Plan
from nanorlhf.engines.base import Engine, Sampling
from nanorlhf.rollout import write
from nanorlhf.scoring import Reward, score
from nanorlhf.seeds import derive
from nanorlhf.types import Prompt, Sample


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    seed: int,
    sampling: Sampling | None = None,
) -> tuple[dict[str, float], list[Sample]]:
    """Mean rewards of one completion for each prompt; the seed is the same each time, so only the weights differ."""
    samples, _ = write(engine, tokenizer, prompts, Plan(1), derive(seed, "evaluation"), sampling)
    score(rewards, samples)
    metrics = {"eval/reward": mean_scored([s.reward for s in samples])}
    if len(rewards) > 1:
        metrics |= {f"eval/{r.name}": mean_scored([s.rewards[r.name] for s in samples]) for r in rewards}
    metrics["eval/length_mean"] = sum(len(s.completion_ids) for s in samples) / len(samples)
    return metrics, samples


def mean_scored(values: Sequence[float | None]) -> float:
    """The mean of what could be scored."""
    scored = [v for v in values if v is not None]
    return sum(scored) / len(scored) if scored else float("nan")
