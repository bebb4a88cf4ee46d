"""Options: frozen dataclasses that check themselves and know other trainers' names."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

import typeguard

from nanorlhf.config.aliases import rename
from nanorlhf.errors import UsageError, nearest

C = TypeVar("C")
LARGEST = 2**53  # beyond, not every whole number is a float


@dataclass(frozen=True, slots=True)
class Bounds:
    """The numbers that an option may be."""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None

    def hold(self, number: float) -> bool:
        """Whether the number is within them."""
        low = (self.above is None or number > self.above) and (self.least is None or number >= self.least)
        return low and (self.below is None or number < self.below) and (self.most is None or number <= self.most)

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"between {self.least:g} and {self.most:g}"
        high = [f"below {self.below:,}"] if self.below is not None else []
        high += [f"at most {self.most:g}"] if self.most is not None else []
        if self.least is not None and not high:
            return f"{self.least:g} or more"
        low = [f"at least {self.least:g}"] if self.least is not None else []
        low += [f"above {self.above:g}"] if self.above is not None else []
        return " and ".join(low + high)


def option(default: Any, about: str, group: str, *, first: bool = False, **bounds: float) -> Any:
    """A dataclass field with its line of help, and the bounds of its number: above, least, below, most.

    `first` marks one of those that people set before all others: the short `--help` lists these alone.
    """
    metadata = {"help": about, "group": group, "first": first, "bounds": Bounds(**bounds)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[C]) -> type[C]:
    """A frozen dataclass that understands other trainers' names and refuses unknown ones and wrong types."""
    cls = dataclass(frozen=True, kw_only=True)(cls)
    plain_init: Callable[..., None] = cls.__init__
    hints = get_type_hints(cls)
    known = defaults(cls)

    @functools.wraps(plain_init)
    def checked_init(self: C, **options: Any) -> None:
        options = rename(options, known)
        for name, given in options.items():
            if name not in known:
                raise UsageError(f"unknown option {name!r}: {nearest(name, known)}")
            options[name] = value = of_type(name, given, hints[name])
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not (math.isfinite(number) and abs(number) < LARGEST):
                    raise UsageError(f"{name}={value!r} cannot work: a finite number below 2^53 is wanted")
        plain_init(self, **options)
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            value, bounds = getattr(self, f.name), f.metadata["bounds"]
            if isinstance(value, int | float) and not bounds.hold(value):
                auto = ", or auto" if "auto" in str(hints[f.name]) else ""
                raise UsageError(f"{f.name}={value!r} cannot work: it must be {bounds}{auto}")
        self.validate()  # type: ignore[attr-defined]

    cls.__init__ = checked_init
    return cls


def of_type(name: str, given: Any, hint: Any) -> Any:
    """The value of an option, a list made of its commas; refuses one of another type."""
    value = as_list(given, hint)
    try:
        typeguard.check_type(value, hint)
    except typeguard.TypeCheckError:
        raise UsageError(f"{name}={value!r} is of the wrong type: it takes {kinds_of(hint)}") from None
    return value


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing (null)"}


def kinds_of(hint: Any) -> str:
    """The values that a type hint stands for, in everybody's words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}" if len(get_args(hint)) > 1 else str(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(kinds_of(part) for part in get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each {kinds_of(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "names with values, such as '{a: 1}'"
    return KINDS.get(hint, str(hint).replace("typing.", ""))


PLACEHOLDERS = {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT"}


def placeholder(hint: Any) -> str:
    """The values that a type hint stands for as `--help` shows them after the option's name."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        listed = next((kind for kind in kinds if get_origin(kind) is list), None)
        return placeholder(listed) if listed else "|".join(map(placeholder, kinds))
    if get_origin(hint) is list:
        return f"{placeholder(get_args(hint)[0])},..."
    return "{NAME: VALUE}" if get_origin(hint) is dict else PLACEHOLDERS[hint]


def defaults(cls: type[Any]) -> dict[str, Any]:
    """Every option's name with its default."""
    fields = dataclasses.fields(cls)
    return {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}


def strings(value: str | Iterable[str]) -> tuple[str, ...]:
    """One string or several, without those that are empty."""
    return tuple(filter(None, [value] if isinstance(value, str) else value))


def split_names(value: str | list[str]) -> list[str]:
    """Names from a list or from one string with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    return [part.strip() for part in parts if part.strip()]


def item_type(hint: Any) -> type | None:
    """Type of the items if an option takes a list and no text of its own: such a list may come as one string."""
    kinds = (hint,) if get_origin(hint) is list else get_args(hint)
    lists = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
    return lists[0] if lists and str not in kinds else None


def as_list(value: Any, hint: Any) -> Any:
    """A list from one string with commas, if the option takes one; what is no such string stays as it is."""
    item = item_type(hint)
    if item is None or not isinstance(value, str) or value.strip().startswith(("[", "{")):
        return value
    try:
        return [item(part) for part in split_names(value)]
    except ValueError:
        return value
