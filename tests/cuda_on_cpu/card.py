"""A card made of main memory: `build` compiles the stub, `insert` puts the card in before torch is imported."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("stub.cpp")
TOTAL = 40 * 2**30  # bytes
waits: Counter[str] = Counter()  # what made the CPU wait for the card, and where


def build(compiler: str, folder: Path) -> Path:
    """The stub for the torch that is installed, compiled if `folder` has it not yet."""
    made = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    library, spec = folder / f"stub-{made}.so", importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    if not library.exists():
        include, lib = Path(spec.origin).with_name("include"), Path(spec.origin).with_name("lib")
        draft = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++20", str(SOURCE), "-o", str(draft)]
        command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
        subprocess.run([*command, f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"], check=True)
        draft.replace(library)
    return library


def insert(library: Path) -> None:
    """Loads the stub; from then on `torch.cuda` answers as on an A100."""
    assert "torch" not in sys.modules, "the stub comes first"
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.bytes_taken.restype = stub.bytes_peak.restype = ctypes.c_int64
    import torch

    properties = SimpleNamespace(total_memory=TOTAL, name="main memory", major=8, minor=0)
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "_lazy_init": None, "device_count": 1, "current_device": 0,
        "get_device_capability": (8, 0), "get_device_properties": properties, "is_bf16_supported": True,
        "get_rng_state_all": [], "set_rng_state_all": None, "empty_cache": None, "cudart": runtime, "check_error": None,
        "current_stream": Stream(), "stream": contextlib.nullcontext(),
    }  # fmt: skip
    asked: dict[str, Any] = {
        "memory_allocated": stub.bytes_taken, "memory_reserved": stub.bytes_taken,
        "max_memory_allocated": stub.bytes_peak, "reset_peak_memory_stats": stub.forget_peak,
        "mem_get_info": lambda: (TOTAL - stub.bytes_taken(), TOTAL), "synchronize": lambda: waited("synchronize"),
    }  # fmt: skip
    for name, ask in (asked | {n: lambda answer=answer: answer for n, answer in answers.items()}).items():
        setattr(torch.cuda, name, lambda *_, ask=ask, **__: ask())
    torch.cuda.Stream = Stream  # type: ignore[misc, assignment]
    torch.cuda.set_per_process_memory_fraction = lambda share: stub.allow_bytes(ctypes.c_int64(int(share * TOTAL)))  # type: ignore[assignment]
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    whole = torch.Tensor.__deepcopy__

    def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        """By kernels, for nothing but CUDA itself makes storages on a card."""
        if not tensor.is_cuda or id(tensor) in memo:
            return whole(tensor, memo)
        return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))

    torch.Tensor.__deepcopy__ = copied  # type: ignore[method-assign]


class Stream:
    """One of many that are all the same here: what is asked for is done at once."""

    def __init__(self, *_: Any) -> None:
        self.wait_stream = self.wait_event = self.record_event = lambda *_: None


def waited(what: str) -> None:
    """Notes that the CPU stood still until the card was through."""
    waits[f"{place()}: {what}"] += 1


def place() -> str:
    """The function of this project that asked for what is being done; in backward there may be none."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if module := ours(frame.f_code.co_filename):
            return f"{module}.{frame.f_code.co_qualname.partition('.<locals>')[0]}"
        frame = frame.f_back
    return "backward"


@functools.cache
def ours(file: str) -> str | None:
    """The module's name, if the file is this project's and no test."""
    path = Path(file)
    if not path.is_relative_to(ROOT) or {"tests", ".venv"} & set(path.relative_to(ROOT).parts):
        return None
    return path.stem
