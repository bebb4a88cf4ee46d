"""0 for a completion of a length that is asked for, down to -1 for one that is `slack` tokens or more away from it.

reward = -min(1, distance / slack), where distance is the tokens that are missing up to `min` or too many beyond `max`.
"""

from __future__ import annotations

from typing import Any

from nanorlhf.errors import UsageError


def length(
    completion_ids: list[list[int]],
    *,
    target: int | None = None,
    min: int | None = None,  # noqa: A002  what a user writes in reward_options
    max: int | None = None,  # noqa: A002  the same
    slack: int = 100,
    **_: Any,
) -> list[float]:
    """Counts how far a completion's tokens, its end token among them, are from [min, max], or from `target`."""
    low = target if target is not None else min or 0
    high = target if target is not None else max
    return [0.0 - share(distance(len(ids), low, high), slack) for ids in completion_ids]


def check(target: int | None, min: int | None, max: int | None, slack: int) -> None:  # noqa: A002
    """Refuses options that cannot work."""
    bounds = {"target": target, "min": min, "max": max}
    said = {name: bound for name, bound in bounds.items() if bound is not None}
    for name, bound in {**said, "slack": slack}.items():
        if type(bound) is not int or bound < (name == "slack"):
            raise UsageError(f"reward_options: length's {name}={bound!r} must be a number of tokens")
    if not said:
        raise UsageError("reward_options: length needs a target, a min or a max: '{length: {max: 400}}'")
    if target is not None and len(said) > 1:
        raise UsageError(f"reward_options: length takes a target or min and max, and was given {said}")
    if min is not None and max is not None and min > max:
        raise UsageError(f"reward_options: length's min={min} is above its max={max}")


def distance(tokens: int, low: int, high: int | None) -> int:
    """Tokens missing or too many."""
    if tokens < low:
        return low - tokens
    return tokens - high if high is not None and tokens > high else 0


def share(away: int, slack: int) -> float:
    """The part of the slack that is used up, at most all of it."""
    return away / slack if away < slack else 1.0
