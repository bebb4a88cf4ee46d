"""An environment with questions of its own: a number to be guessed, higher or lower after every guess."""

from __future__ import annotations

import re
from typing import Any
from zlib import crc32

HIGHEST = 100
GUESS = re.compile(r"\d+")


class Guessing:
    """Worth 1 for the number at once, less for every guess, nothing if it is not found."""

    @staticmethod
    def rows(split: str) -> list[dict[str, Any]]:
        """Every number once, in ten variants of the question; a checksum holds some of them out."""
        if split not in ("train", "test"):
            raise ValueError(f"number guessing has no split {split!r}: choose 'train' or 'test'")
        every = [{"secret": secret, "round": r} for secret in range(1, HIGHEST + 1) for r in range(10)]
        held_out = [crc32(f"{row['secret']} {row['round']}".encode()) % 10 == 0 for row in every]
        return [row for row, out in zip(every, held_out, strict=True) if out == (split == "test")]

    def reset(self, secret: int, **_: Any) -> str:
        self.secret, self.guesses = secret, 0
        return f"Guess my number, 1 to {HIGHEST}. Say a number only."

    def step(self, completion: str) -> tuple[str, float, bool]:
        found = GUESS.findall(completion)
        self.guesses += 1
        if not found:
            return "Say a number.", 0.0, False
        guess = int(found[-1][:9])
        if guess == self.secret:
            return "", 1 / self.guesses**0.5, True
        return ("higher" if guess < self.secret else "lower"), 0.0, False
