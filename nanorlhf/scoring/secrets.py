"""Leaves secrets out of the environment that other processes are given."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

SECRET = re.compile(r"SECRET|PASSW|CREDENTIAL|(TOKEN|KEY|PASS)S?(_|$)", re.IGNORECASE)


def without_secrets(environment: Mapping[str, str], allowed: Collection[str] = ()) -> dict[str, str]:
    """The variables whose names do not say that they hold a secret, and those that are allowed all the same."""
    return {name: value for name, value in environment.items() if name in allowed or not SECRET.search(name)}
