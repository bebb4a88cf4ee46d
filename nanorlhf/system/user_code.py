"""Loads what users bring in files of their own: `path/to/file.py:name`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from nanorlhf.errors import UsageError, error_line, nearest


def is_file_spec(spec: str) -> bool:
    """Whether this names something in a Python file."""
    return spec.rpartition(":")[0].endswith(".py")


def from_file(spec: str) -> Any:
    """The object that `path/to/file.py:name` names, whatever the file's folder."""
    where, _, name = spec.rpartition(":")
    path = Path(where)
    if not path.is_file():
        raise UsageError(f"{spec!r}: there is no file {path}")
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    listed = sys.modules.setdefault(path.stem, module)  # dataclasses look there for the module they are in
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} cannot be imported: {error_line(error)}") from error
    finally:
        if listed is module:
            del sys.modules[path.stem]  # no other import is to find it there
    if not hasattr(module, name):
        raise UsageError(f"{spec!r}: {path} defines no {name!r}; {nearest(name, vars(module))}")
    return getattr(module, name)
