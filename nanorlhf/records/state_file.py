"""Nested state as JSON and safetensors: nothing in such files can run when they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def write(value: Any, folder: Path, name: str) -> None:
    """Two files, `name`.json and `name`.safetensors."""
    tensors: dict[str, Tensor] = {}
    (folder / f"{name}.json").write_text(json.dumps(packed(value, tensors)))
    save_file(tensors, folder / f"{name}.safetensors")


def read(folder: Path, name: str) -> Any:
    """Reads the value that `write` was given."""
    return unpacked(json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors"))


def packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value in a form that JSON can hold; tensors go into `tensors`, under numbers."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, np.ndarray):
        return {"array": packed(torch.from_numpy(value), tensors)}
    if isinstance(value, dict):
        return {"dict": [[packed(k, tensors), packed(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [packed(v, tensors) for v in value]}
    if isinstance(value, list):
        return [packed(v, tensors) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} is no state that can be kept")


def unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `packed` was given."""
    if isinstance(value, list):
        return [unpacked(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "array":
        return unpacked(held, tensors).numpy()
    if kind == "tuple":
        return tuple(unpacked(v, tensors) for v in held)
    return {unpacked(k, tensors): unpacked(v, tensors) for k, v in held}
