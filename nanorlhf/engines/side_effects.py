"""Good manners for a library that thinks the process is its own: what it changes is changed back."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def kept_random_state(devices: list[int]) -> Iterator[None]:
    """Lets vLLM draw and seed as it likes: the process's random numbers go on as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 the global state is what vLLM seeds
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def group_kept() -> Iterator[None]:
    """Lets vLLM take down groups of its own, and not the one of the run's processes, which it thinks is its own too."""
    destroy = distributed.destroy_process_group
    distributed.destroy_process_group = lambda group=None: destroy(group) if group is not None else None
    try:
        yield
    finally:
        distributed.destroy_process_group = destroy


@contextlib.contextmanager
def classes_kept(decorators: Any) -> Iterator[Callable[[nn.Module], None]]:
    """Takes back what vLLM makes of transformers' classes, which the trainer's model is of, too; `decorators` is its
    module that does it. What is given back moves vLLM's own model to a class of its own, decorated as before."""
    decorate = decorators._support_torch_compile  # noqa: SLF001  all its decorators come to this one
    before: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}
    own: dict[type, type] = {}

    def noting(cls: type, *args: Any, **kwargs: Any) -> type:
        if issubclass(cls, PreTrainedModel):
            before.setdefault(cls, (cls.__bases__, dict(vars(cls))))
        return decorate(cls, *args, **kwargs)

    def added(cls: type) -> dict[str, Any]:
        return {name: value for name, value in vars(cls).items() if before[cls][1].get(name) is not value}

    def move(model: nn.Module) -> None:
        for module in model.modules():
            cls = type(module)
            if cls in before:
                bases = (cls, *cls.__bases__[len(before[cls][0]) :])
                module.__class__ = own.setdefault(
                    cls, type(cls.__name__, bases, added(cls) | {"__module__": cls.__module__})
                )

    decorators._support_torch_compile = noting  # noqa: SLF001
    try:
        yield move
    finally:
        decorators._support_torch_compile = decorate  # noqa: SLF001
        for cls, (bases, names) in before.items():
            for name in added(cls):
                if name in names:
                    setattr(cls, name, names[name])
                else:
                    delattr(cls, name)
            cls.__bases__ = bases


@contextlib.contextmanager
def undisturbed(verbose: bool) -> Iterator[None]:
    """Takes back what starting vLLM does to the process: variables, threads, warnings, precision, hooks, collection."""
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    ours |= {} if verbose else {"VLLM_CONFIGURE_LOGGING": "0"}
    environment, hook, frozen = dict(os.environ), sys.excepthook, gc.get_freeze_count()
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    os.environ.update(ours)
    # What goes wrong is raised, too, and without the whole state of the scheduler.
    logging.getLogger("vllm").setLevel(logging.INFO if verbose else logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action=None if verbose else "ignore"),
            contextlib.nullcontext() if verbose else silence(),
        ):
            yield
    finally:
        torch.set_num_threads = set_threads  # on a CPU vLLM puts one in its place that does nothing
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        sys.excepthook = hook
        if not frozen:
            gc.unfreeze()
        restore(environment, ours)


def restore(environment: dict[str, str], ours: dict[str, str]) -> None:
    """Every variable as it was, but for vLLM's notes to itself, some of which it reads later."""
    for name in os.environ.keys() | environment.keys():
        if name.startswith("VLLM_") and name not in ours:
            continue
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing reaches the terminal, not even from C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in kept:
            os.dup2(nowhere, stream)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def nameless_file() -> str:
    """The address where the process meets itself: a file of vLLM's own choice would stay after a kill."""
    return f"file:///proc/self/fd/{os.memfd_create('vllm')}"
