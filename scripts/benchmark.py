"""Measures our side against TRL on the same work, and against itself, in a checkout: evidence/speed/benchmark.py."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Hands over to the benchmark; a wheel has none."""
    if not (ROOT / "evidence").is_dir():
        print("nanorlhf benchmark: it is no part of the package; run it in a checkout", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    return import_module("evidence.speed.benchmark").main(argv)


if __name__ == "__main__":
    sys.exit(main())
