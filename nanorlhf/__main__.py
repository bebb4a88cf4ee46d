"""`nanorlhf COMMAND ...` runs an algorithm or a script; nothing heavy is imported before the command is known."""

from __future__ import annotations

import sys
from importlib import import_module

from nanorlhf.system.signals import INTERRUPTED, terminating_as_ctrl_c

ALGORITHMS = (
    "grpo",
    "ppo",
    "rloo",
    "remax",
    "raft",
    "reinforce",
    "sft",
    "dpo",
    "online_dpo",
    "reward_model",
)  # nanorlhf.<name>.__main__
SCRIPTS = (
    "benchmark",
    "compare",
    "evaluate",
    "install",
    "make_models",
    "merge",
    "push",
    "report",
)  # nanorlhf.scripts.<name>
USAGE = f"""usage: nanorlhf COMMAND [OPTION ...]

algorithms: {" ".join(ALGORITHMS)}
scripts:    {" ".join(SCRIPTS)}

nanorlhf grpo --recipe tiny       trains a small model that comes with it
nanorlhf COMMAND --help           the options of a command that are set first
nanorlhf ALGORITHM --help all     all of its options
nanorlhf --version                what is installed"""


def main(argv: list[str] | None = None) -> int:
    """Hands the rest of the line to the command it names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ALGORITHMS:
        return import_module(f"nanorlhf.{name}.__main__").main(rest)
    if name in SCRIPTS:
        try:
            with terminating_as_ctrl_c():
                return import_module(f"nanorlhf.scripts.{name}").main(rest)
        except KeyboardInterrupt:
            print(f"nanorlhf {name}: interrupted", file=sys.stderr)
            return INTERRUPTED
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        print(f"nanorlhf {import_module('nanorlhf.system.versions').installed()}")
        return 0
    near = import_module("nanorlhf.errors").nearest(name, ALGORITHMS + SCRIPTS)
    print(f"nanorlhf: there is no command {name!r}; {near}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
