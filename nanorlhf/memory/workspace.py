"""Bytes that a pass over a row of tokens takes beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes by the tokens of a row."""

    fixed: float
    per_token: float

    def __call__(self, tokens: int) -> int:
        return round(self.fixed + self.per_token * tokens)

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> Line:
        """The line through two points (tokens, bytes)."""
        slope = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - slope * first[0], slope)


@dataclass(frozen=True, slots=True)
class Workspace:
    """The memory of a pass over a row beside the weights: in the layers, or what they keep and the LM head's share."""

    body: Line  # the most that the layers have at once
    kept: Line  # of which this is there when they are through
    head: Line

    def __call__(self, tokens: int) -> int:
        return max(self.body(tokens), self.kept(tokens) + self.head(tokens))


def largest(spaces: Sequence[Workspace], tokens: int) -> Workspace:
    """One that none of these exceeds, in no part, by the tokens of a row."""
    parts = zip(*((space.body, space.kept, space.head) for space in spaces), strict=True)
    return Workspace(*(max(lines, key=lambda line: line(tokens)) for lines in parts))


def between(low: Line, high: Line, at: float) -> Line:
    """The line that lies `at` of the way from one to the other, or beyond."""
    fixed = low.fixed + at * (high.fixed - low.fixed)
    return Line(fixed, low.per_token + at * (high.per_token - low.per_token))
