"""The pieces of a row, and what their tokens see of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Pieces of a row, end to end: each token sees those before it in its piece, and an answer its whole prompt too."""

    families: list[tuple[int, ...]]  # lengths of a prompt and of the answers beside it, or of one sample
    ends: Tensor  # (s+1,) int32, where pieces start and end
    seen: Tensor | None  # (K,) the places of all that each piece sees, piece by piece; None if they see only themselves
    seen_ends: Tensor  # (s+1,) int32, where these start and end

    @classmethod
    def of(cls, families: Iterable[tuple[int, Sequence[int]]]) -> Segments:
        """Lengths of prompts and of the answers to each; a prompt and its only answer are one piece."""
        pieces: list[tuple[int, ...]] = []
        seen: list[Tensor] = []
        start = 0
        for prompt, answers in families:
            lengths = (prompt + answers[0],) if len(answers) == 1 else (prompt, *(n for n in answers if n))
            places = (torch.arange(start, start + sum(lengths))).split(lengths)
            seen += [places[0], *(torch.cat([places[0], own]) for own in places[1:])]
            pieces.append(lengths)
            start += sum(lengths)
        apart = any(len(lengths) > 1 for lengths in pieces)
        ends = [0, *accumulate(n for lengths in pieces for n in lengths)]
        seen_ends = [0, *accumulate(map(len, seen))]
        bounds, seen_bounds = (torch.tensor(x, dtype=torch.int32) for x in (ends, seen_ends))
        return cls(pieces, bounds, torch.cat(seen) if apart else None, seen_bounds)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each piece."""
        return [n for lengths in self.families for n in lengths]

    @property
    def visible(self) -> list[int]:
        """Tokens that the last one of each piece sees."""
        return [n + lengths[0] * (i > 0) for lengths in self.families for i, n in enumerate(lengths)]

    def to(self, device: torch.device, non_blocking: bool = False) -> Segments:
        """The same on `device`."""
        seen = None if self.seen is None else self.seen.to(device, non_blocking=non_blocking)
        ends, seen_ends = (x.to(device, non_blocking=non_blocking) for x in (self.ends, self.seen_ends))
        return replace(self, ends=ends, seen=seen, seen_ends=seen_ends)
