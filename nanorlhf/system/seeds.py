"""One seed for a run, and every other one derived from it."""

from __future__ import annotations

import hashlib


def derive(seed: int, *what: int | str) -> int:
    """A 31-bit seed for an occasion, such as a step: another one each time, the same one when a run is resumed."""
    text = "/".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 2**31
