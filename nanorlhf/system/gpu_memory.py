"""The GPU's memory that this process may use, and what is left of it: all that goes by the card's memory asks here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from nanorlhf.system.device import CONTEXT, GIB


@dataclass(frozen=True, slots=True)
class Share:
    """This process's part of its card."""

    bytes: int  # in all, with what CUDA itself takes
    spared: int  # that are free, and not for it


_share: Share | None = None


def hold(limit: float | Literal["auto"]) -> int | None:
    """Holds this process to `limit` GiB of its card, or to what is free as it begins; as bytes, if that is known."""
    global _share  # noqa: PLW0603  a process has one card
    said = None if limit == "auto" else int(limit * GIB)
    if not torch.cuda.is_available():
        return said
    free, total = torch.cuda.mem_get_info()
    there = min(total, free + CONTEXT)  # by now CUDA has taken its own
    _share = Share(said or there, max(0, there - (said or there)))
    return _share.bytes


def allowed(device: torch.device) -> int:
    """Bytes that this process may have in all."""
    return _share.bytes if _share else torch.cuda.mem_get_info(device)[1]


def left(device: torch.device | None = None) -> int:
    """Bytes of these that are still free."""
    return max(0, torch.cuda.mem_get_info(device)[0] - (_share.spared if _share else 0))
