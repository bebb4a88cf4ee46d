"""Tells from a run's metrics what goes wrong, in words, with what to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from nanorlhf.config.training import WITHOUT_REWARDS

Row = Mapping[str, Any]

ADVICE = {
    "truncation": "a larger max_completion_length; see whether the end token is the one that the chat template writes",
    "no_spread": "easier or harder prompts, a finer reward, a higher temperature, num_generations, dynamic_sampling",
    "entropy_collapse": "a higher temperature, clip_high above clip_low, entropy_coef, kl_coef, a lower learning_rate",
    "kl_runaway": "a higher kl_coef, kl_target, a lower learning_rate; read samples: is the reward being tricked?",
    "gradient_spike": "a lower learning_rate or max_grad_norm; read the step's samples for something odd",
    "stale_engine": "another weight_sync or engine; on 16-bit weights importance_correction, or dtype float32",
}
WINDOW = 20  # steps before, which a step is held against
FEW = 5  # fewer say nothing yet


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that is wrong with a step."""

    step: int
    kind: str  # of ADVICE
    words: str

    @property
    def advice(self) -> str:
        return ADVICE[self.kind]


def remarks(rows: Sequence[Row]) -> list[Diagnosis]:
    """All that is wrong with a run so far."""
    return [remark for i in range(len(rows)) for remark in look(rows, i)]


def look(rows: Sequence[Row], at: int = -1) -> list[Diagnosis]:
    """The faults of one row, given those before it; an evaluation before the first step has none."""
    at %= len(rows)
    row, before = rows[at], rows[:at]
    if "loss" not in row:
        return []
    kinds = CHECKS if "reward/mean" in row else WITHOUT_REWARDS  # without rewards the rest is as it should be
    said = ((kind, CHECKS[kind](row, before)) for kind in kinds)
    return [Diagnosis(row["step"], kind, words) for kind, words in said if words]


def begun(rows: Sequence[Row]) -> list[Diagnosis]:
    """The faults of the last row that the one before it did not have."""
    before = {remark.kind for remark in look(rows, len(rows) - 2)} if len(rows) > 1 else set()
    return [remark for remark in look(rows) if remark.kind not in before]


def truncation(row: Row, _: Sequence[Row]) -> str | None:
    share = row.get("completion/truncated_fraction") or 0
    return f"{share:.0%} of completions hit max_completion_length without an end token" if share > 0.9 else None


def no_spread(row: Row, _: Sequence[Row]) -> str | None:
    if row.get("groups/no_spread_fraction") != 1 or "value/loss" in row:  # a critic tells the answers apart
        return None
    return "no group has two different rewards, so nothing can be learned from this step"


def entropy_collapse(row: Row, before: Sequence[Row]) -> str | None:
    """Little is left of it; if groups are compared, also so little variety that most of them agree."""
    first = typical("entropy", before[: FEW + 1], least=3)  # a step that trained on nothing has none
    entropy, alike = row.get("entropy"), row.get("groups/no_spread_fraction")
    if first is None or entropy is None or entropy > first / 10 or (alike is not None and alike < 0.8):
        return None
    agree = "" if alike is None else f", and {alike:.0%} of groups earn one reward"
    return f"entropy fell from {first:.3g} to {entropy:.3g} nats a token{agree}"


def kl_runaway(row: Row, before: Sequence[Row]) -> str | None:
    usual, kl = typical("kl", before), row.get("kl")
    if kl is None or not (kl > 1 or (usual is not None and kl > 0.05 and kl > 10 * usual)):
        return None
    return f"the policy is {kl:.3g} nats a token from its reference" + (f", from {usual:.3g}" if usual else "")


def gradient_spike(row: Row, before: Sequence[Row]) -> str | None:
    usual, norm = typical("grad_norm", before), row.get("grad_norm")
    if usual is None or norm is None or norm <= 20 * usual or not usual:
        return None
    return f"the gradient's norm is {norm:.3g}, {norm / usual:.0f} times what it was"


def stale_engine(row: Row, _: Sequence[Row]) -> str | None:
    gap, limit = row.get("mismatch/mean_abs"), row.get("mismatch/limit")
    if gap is None or limit is None or gap <= limit:
        return None
    return (
        f"engine and trainer disagree by {gap:.3g} nats a token (more than {limit:g}): "
        "the engine is stale, or computes otherwise"
    )


def typical(name: str, rows: Sequence[Row], least: int = FEW) -> float | None:
    """The median of the last rows that have it, if there are enough."""
    values = [row[name] for row in rows[-WINDOW:] if row.get(name) is not None]
    return median(values) if len(values) >= least else None


CHECKS: dict[str, Callable[[Row, Sequence[Row]], str | None]] = {
    "truncation": truncation,
    "no_spread": no_spread,
    "entropy_collapse": entropy_collapse,
    "kl_runaway": kl_runaway,
    "gradient_spike": gradient_spike,
    "stale_engine": stale_engine,
}
