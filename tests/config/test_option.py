"""An option that an algorithm gives another default keeps the bounds it had."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import pytest

from nanorlhf.__main__ import ALGORITHMS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_another_default_is_within_the_same_bounds(name: str) -> None:
    package = import_module(f"nanorlhf.{name}")
    config_class = getattr(package, next(found for found in package.__all__ if found.endswith("Config")))
    own = {f.name: f.metadata["bounds"] for f in dataclasses.fields(config_class)}
    for base in config_class.__mro__[1:]:
        for f in dataclasses.fields(base) if dataclasses.is_dataclass(base) else ():
            wide = f.metadata["bounds"]
            for number in (-1, 0):
                assert wide.hold(number) or not own[f.name].hold(number), f"{f.name} may be {number} here"
