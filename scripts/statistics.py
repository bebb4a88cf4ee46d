"""Figures of several samples of each prompt, and how sure one may be of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from scipy import stats

Z = NormalDist().inv_cdf(0.975)
ROUNDING = 1e-6  # of a value: means that are kept in float32 differ by that and say nothing


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts with its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f}-{self.high:.3f})"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value for each prompt, prompts being what varies.

    If every value is 0 or 1, the interval is Wilson's (doi:10.1080/01621459.1927.10502953), which is right at the ends
    too; else it is the normal one, within 0 and 1 if every value is.
    """
    n, mean = len(values), fmean(values)
    if all(value in (0, 1) for value in values):
        interval = stats.binomtest(round(sum(values)), n).proportion_ci(method="wilson")
        return Estimate(mean, interval.low, interval.high)
    margin = Z * stdev(values) / math.sqrt(n) if n > 1 else math.inf
    low, high = (0.0, 1.0) if all(0 <= value <= 1 for value in values) else (-math.inf, math.inf)
    return Estimate(mean, max(low, mean - margin), min(high, mean + margin))


def pass_at(k: int, passed: Sequence[bool]) -> float:
    """The chance that one of k of these samples passes, without bias (arXiv:2107.03374)."""
    n, right = len(passed), sum(passed)
    assert k <= n, "no more samples can be drawn than there are"
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_at(k: int, answers: Sequence[Hashable], passed: Sequence[bool]) -> float:
    """Whether the most frequent of the first k answers passes; those that tie share the verdict.

    Samples without an answer (None) do not vote; if none votes, nothing passes.
    """
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return fmean(float(passed[list(answers).index(winner)]) for winner in winners)


def differ(a: Sequence[bool], b: Sequence[bool]) -> float:
    """The two-sided p-value that two shares are one."""
    return p_value(z_score(fmean(map(float, a)), fmean(map(float, b)), len(a), len(b)))


def z_score(before: float, after: float, count: int, then: int | None = None) -> float:
    """By how many standard errors a share of `count` rose to one of `then` (the same number): two proportions."""
    then = count if then is None else then
    pooled = (before * count + after * then) / (count + then)
    error = math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / then))
    return (after - before) / error if error else 0.0


def p_value(z: float) -> float:
    """The probability that chance alone goes as far, to either side."""
    return 2 * NormalDist().cdf(-abs(z))


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The two-sided p-value that two means are one, whatever the spread of each: Welch's t-test of few values.

    None if they differ and neither varies by more than rounding: there is no noise to hold the difference against.
    If only one does not vary, its mean counts as known, and the other's spread is all there is to judge by.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("the spread of a single value is unknown")
    apart, rounding = abs(fmean(a) - fmean(b)), ROUNDING * max(map(abs, (*a, *b)))
    if max(stdev(a), stdev(b)) <= rounding:
        return 1.0 if apart <= rounding else None
    test: Any = stats.ttest_ind_from_stats(fmean(a), stdev(a), len(a), fmean(b), stdev(b), len(b), equal_var=False)
    return float(test.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """P-values such that any of them is below a level by chance no more often than the level says (Holm 1979)."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, values[at] * (len(values) - rank)))
        corrected[at] = largest
    return corrected


def shows_from(count: int, tests: int, level: float = 0.05) -> float:
    """The standard deviations that two means of `count` values must lie apart for the first of `tests` to show it."""
    return float(stats.t.isf(level / tests / 2, 2 * (count - 1))) * math.sqrt(2 / count)
