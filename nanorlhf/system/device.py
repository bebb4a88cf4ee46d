"""The device that a run computes on, and the memory that it takes there."""

from __future__ import annotations

import gc
import resource
import sys

import torch

from nanorlhf.errors import UsageError

GIB = 2**30
CONTEXT = GIB  # CUDA's own, and its libraries'

SAID = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # what the driver and its libraries call it


def ran_out(error: Exception) -> bool:
    """Whether an error says that the device's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SAID)


def empty_cache() -> None:
    """Gives back memory that nothing holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def pick_device(name: str) -> torch.device:
    """The device asked for, or the first there is of cuda, mps and cpu."""
    if name != "auto":
        kinds = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        there = [kind for kind, here in kinds.items() if here]
        name = "cuda" if name == "cuda:0" else name
        if name not in there:
            other = "; CUDA_VISIBLE_DEVICES chooses a card" if name.startswith("cuda:") else ""
            raise UsageError(f"device={name!r} cannot work: here there are {', '.join(there)}, and auto{other}")
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def taken(device: torch.device) -> int:
    """Bytes of the card that any process has."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def peak_gib(device: torch.device) -> float:
    """Peak memory: the CUDA allocator's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
