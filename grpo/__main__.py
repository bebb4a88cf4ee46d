"""`python -m grpo`, `nanorlhf grpo`."""

from __future__ import annotations

import sys
from pathlib import Path

from nanorlhf.cli import run
from nanorlhf.grpo.config import GRPOConfig


def train(config: GRPOConfig) -> None:
    """Trains as configured; torch is imported here, after the command line was understood."""
    from nanorlhf.grpo.algorithm import GRPOTrainer

    GRPOTrainer(args=config).train()


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    return run("grpo", Path(__file__).parent, GRPOConfig, train, argv)


if __name__ == "__main__":
    sys.exit(main())
