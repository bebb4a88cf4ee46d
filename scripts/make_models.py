"""Makes the models that come with the package, each half taught, so that training has something left to teach.

    nanorlhf make_models adder storyteller counter

`adder` nearly adds and seldom answers in tags; `storyteller` tells stories that mostly say the same thing again;
`counter` counts down, but mostly by ten, whatever step it is asked. They see the train splits of their datasets only,
and the same bytes are written every time on the same machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nanorlhf

OUTPUT = Path(str(nanorlhf.__file__)).parent / "models"
MODELS = ("adder", "storyteller", "counter")


def main(argv: list[str] | None = None) -> int:
    """Makes each model with its tokenizer, and saves both."""
    parser = argparse.ArgumentParser(
        prog="nanorlhf make_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"which to make: {', '.join(MODELS)} (default: all)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for theirs (default: %(default)s)")
    chosen = parser.parse_args(argv)
    if unknown := set(chosen.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; choose from {', '.join(MODELS)}")
    from nanorlhf.scripts.small_models import make  # here, so that --help is quick

    for name in chosen.models or MODELS:
        make(name, chosen.output / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
