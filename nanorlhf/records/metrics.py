"""A step in numbers, under the names that metrics.jsonl promises."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nanorlhf.formulas.advantages import has_spread
from nanorlhf.system.distributed import world
from nanorlhf.types import Rollout

PHASES = ("rollout", "reward", "measure", "update", "sync")


class Clock:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def metrics(self, rollout_tokens: int, episodes: int) -> dict[str, float]:
        """Times and throughput, the whole step's time being everything since this clock was made."""
        step = time.perf_counter() - self.start
        times = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        speed = {"throughput/tokens_per_s": rollout_tokens / step, "throughput/episodes_per_s": episodes / step}
        return times | {"time/step": step} | speed


class Averages:
    """Means and maxima over the trained tokens of a step, whatever the micro-batches."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.maxima: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Takes in per-token values."""
        values = values.detach().cpu() if values.device.type == "mps" else values.detach()  # which has no float64
        self.sums[name] += values.double().sum().item()
        self.counts[name] += values.numel()

    def peak(self, name: str, values: Tensor) -> None:
        """Takes in per-token values of which the largest matters."""
        if values.numel():
            self.maxima[name] = max(self.maxima.get(name, 0.0), values.max().item())

    def copy(self) -> Averages:
        """The same figures, to go on from."""
        other = Averages()
        other.sums.update(self.sums)
        other.counts.update(self.counts)
        other.maxima.update(self.maxima)
        return other

    def gather(self) -> Averages:
        """Those of all processes."""
        every = Averages()
        for part in world().gather(self):
            for name, total in part.sums.items():
                every.sums[name] += total
                every.counts[name] += part.counts[name]
            for name, value in part.maxima.items():
                every.maxima[name] = max(every.maxima.get(name, 0.0), value)
        return every

    def metrics(self, names: Sequence[str]) -> dict[str, float | None]:
        """Means and maxima; None for a name that nothing was added to."""
        means = {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}
        return dict.fromkeys(names) | means | self.maxima


def rollout_metrics(rollout: Rollout) -> dict[str, float | None]:
    """Lengths of a rollout, and, if rewards scored it, what they say of samples and groups."""
    lengths = rollout.lengths.float()
    metrics: dict[str, float | None] = {
        "completion/length_mean": lengths.mean().item(),
        "completion/length_max": lengths.max().item(),
        "completion/truncated_fraction": sum(not s.stopped for s in rollout.samples) / len(rollout.samples),
        "tokens/rollout": rollout.written,
        **rollout.figures,
    }
    if "age" in rollout.columns:
        metrics |= ages(rollout.columns["age"])
    names = rollout.samples[0].rewards.keys()
    if not names:
        return metrics
    for name in names:
        scores = torch.tensor([v for s in rollout.samples if (v := s.rewards[name]) is not None])
        metrics[f"reward/{name}"], metrics[f"reward/{name}/std"] = mean_and_spread(scores)
    metrics["reward/mean"], metrics["reward/std"] = mean_and_spread(rollout.rewards[~rollout.rewards.isnan()])
    return metrics | {
        "reward/unscored": float(rollout.rewards.isnan().sum()),
        "groups/no_spread_fraction": no_spread(rollout),
    }


def ages(age: Tensor) -> dict[str, float | None]:
    """The share of tokens that older weights wrote, and how many steps old these are."""
    older = age[age > 0]
    return {
        "age/old_fraction": len(older) / len(age),
        "age/old_mean": older.mean().item() if len(older) else None,
        "age/max": age.max().item(),
    }


def no_spread(rollout: Rollout) -> float | None:
    """The share of samples whose whole group earned one reward; None if every group is of one."""
    if len(rollout.samples) == len(rollout.group.unique()):
        return None
    return 1 - has_spread(rollout.rewards, rollout.group).float().mean().item()


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: a figure that is no number was not measured."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_and_spread(values: Tensor) -> tuple[float | None, float | None]:
    """Of as many as there are."""
    return values.mean().item() if len(values) else None, values.std().item() if len(values) > 1 else None


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """The share of the returns' variance that the values account for: 1 all, 0 none; None where there is none."""
    if len(returns) < 2 or not (variance := returns.double().var()):
        return None
    return 1 - ((returns - values).double().var() / variance).item()
