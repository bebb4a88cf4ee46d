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

    lengths: list[int]
    prompts: list[int | None]  # which piece is the prompt of this one, if it stands apart
    ends: Tensor  # (s+1,) int32, where pieces start and end
    seen: Tensor | None  # (K,) the places of all that each piece sees, piece by piece; None if they see only themselves
    seen_ends: Tensor  # (s+1,) int32, where these start and end

    @classmethod
    def of(cls, families: Iterable[tuple[int, Sequence[int]]]) -> Segments:
        """Lengths of prompts and of the answers to each; a prompt and its only answer are one piece."""
        lengths: list[int] = []
        prompts: list[int | None] = []
        for prompt, answers in families:
            if len(answers) == 1:
                lengths.append(prompt + answers[0])
                prompts.append(None)
                continue
            written = [length for length in answers if length]
            prompts += [None, *[len(lengths)] * len(written)]
            lengths += [prompt, *written]
        ends = [0, *accumulate(lengths)]
        seen = [torch.arange(ends[i], ends[i + 1]) for i in range(len(lengths))]
        seen = [own if p is None else torch.cat([seen[p], own]) for p, own in zip(prompts, seen, strict=True)]
        sizes = torch.tensor([0, *map(len, seen)])
        apart = any(p is not None for p in prompts)
        bounds = torch.tensor(ends, dtype=torch.int32)
        return cls(lengths, prompts, bounds, torch.cat(seen) if apart else None, sizes.cumsum(0, dtype=torch.int32))

    @property
    def visible(self) -> list[int]:
        """How many tokens the last one of each piece sees."""
        return [n if p is None else n + self.lengths[p] for n, p in zip(self.lengths, self.prompts, strict=True)]

    def to(self, device: torch.device, non_blocking: bool = False) -> Segments:
        """The same on `device`."""
        seen = None if self.seen is None else self.seen.to(device, non_blocking=non_blocking)
        ends, seen_ends = (x.to(device, non_blocking=non_blocking) for x in (self.ends, self.seen_ends))
        return replace(self, ends=ends, seen=seen, seen_ends=seen_ends)
