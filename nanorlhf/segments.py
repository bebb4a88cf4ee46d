"""The pieces of a row, and what their tokens see of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Pieces of a row, end to end: each token sees those before it in its piece, and an answer its whole prompt too.

    The prompts of a row may have a beginning in common, such as a system prompt: the first piece, which all see.
    """

    families: list[tuple[int, ...]]  # lengths of a prompt and of the answers beside it, or of one sample
    common: int  # tokens of the beginning, which these lengths leave out
    ends: Tensor  # (s+1,) int32, where pieces start and end
    seen: Tensor | None  # (K,) the places of all that each piece sees, piece by piece; None if they see only themselves
    seen_ends: Tensor  # (s+1,) int32, where these start and end

    @classmethod
    def of(cls, families: Iterable[tuple[int, Sequence[int]]], common: int = 0) -> Segments:
        """Lengths of prompts and of the answers to each; a prompt and its only answer are one piece."""
        pieces: list[tuple[int, ...]] = []
        first, start = torch.arange(common), common
        seen = [first] if common else []
        for prompt, answers in families:
            lengths = (prompt + answers[0],) if len(answers) == 1 else (prompt, *(n for n in answers if n))
            places = (torch.arange(start, start + sum(lengths))).split(lengths)
            prompt_seen = torch.cat([first, places[0]])
            seen += [prompt_seen, *(torch.cat([prompt_seen, own]) for own in places[1:])]
            pieces.append(lengths)
            start += sum(lengths)
        apart = common > 0 or any(len(lengths) > 1 for lengths in pieces)
        lengths = [common] * (common > 0) + [n for piece in pieces for n in piece]
        ends = [0, *accumulate(lengths)]
        seen_ends = [0, *accumulate(map(len, seen))]
        bounds, seen_bounds = (torch.tensor(x, dtype=torch.int32) for x in (ends, seen_ends))
        return cls(pieces, common, bounds, torch.cat(seen) if apart else None, seen_bounds)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each piece."""
        return [self.common] * (self.common > 0) + [n for lengths in self.families for n in lengths]

    @property
    def visible(self) -> list[int]:
        """Tokens that the last one of each piece sees."""
        own = [n + lengths[0] * (i > 0) for lengths in self.families for i, n in enumerate(lengths)]
        return [self.common] * (self.common > 0) + [self.common + n for n in own]

    def padded(self, tokens: int) -> Segments:
        """The same and a piece of so many tokens at the end, which nobody else sees."""
        if not tokens:
            return self
        first, own = (torch.arange(n, device=self.ends.device) for n in (self.common, tokens))
        seen = None if self.seen is None else torch.cat([self.seen, first, self.ends[-1] + own])
        ends = torch.cat([self.ends, self.ends[-1:] + tokens])
        seen_ends = torch.cat([self.seen_ends, self.seen_ends[-1:] + self.common + tokens])
        return replace(self, families=[*self.families, (tokens,)], ends=ends, seen=seen, seen_ends=seen_ends)

    def to(self, device: torch.device, non_blocking: bool = False) -> Segments:
        """The same on `device`."""
        seen = None if self.seen is None else self.seen.to(device, non_blocking=non_blocking)
        ends, seen_ends = (x.to(device, non_blocking=non_blocking) for x in (self.ends, self.seen_ends))
        return replace(self, ends=ends, seen=seen, seen_ends=seen_ends)
