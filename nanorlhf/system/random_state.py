"""The state of every random generator of this process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}  # noqa: NPY002


def restore_random(kept: dict[str, Any]) -> None:
    """Puts every random generator back to where it stood."""
    random.setstate(kept["python"])
    np.random.set_state(kept["numpy"])  # noqa: NPY002
    torch.set_rng_state(kept["torch"])
    if kept["cuda"]:
        torch.cuda.set_rng_state_all(kept["cuda"][: torch.cuda.device_count()])  # fewer may be seen than before
