"""The first quarter of an hour with a card: two runs, each figure a line of JSON: `python -m evidence.gpu.first 1`.

1: without vLLM. The machine, attention, moves, gradients, the adapter, one row of a 1.5B model and its kernels.
2: with vLLM, in one process. Its start, speed, agreement with the trainer, seeds, sleep, whole steps of GRPO and PPO.

A check that fails says so, and the next one runs; one that no longer fits into the time is skipped and named.
`--device cpu --tiny` tries a run out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

SECONDS = {"1": 240.0, "2": 360.0}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # there is no network to find another
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # flashinfer is not carried along, and vLLM takes it for granted
}


def main(argv: list[str] | None = None) -> int:
    """Carries out a run; 1 if anything in it did not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m evidence.gpu.first", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", choices=SECONDS, help="Which of the two.")
    parser.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="Some of its checks (default: all).")
    parser.add_argument("--seconds", type=float, help="For all checks together (default: 240, and 360 for run 2).")
    parser.add_argument("--commit", default="", help="What git would say, where the checkout came without it.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for --tiny.")
    parser.add_argument("--tiny", action="store_true", help="Shapes of a few thousand weights, rows of a few tokens.")
    parser.add_argument("--output", type=Path, default=Path("results"), help="Folder (default: results).")
    options = parser.parse_args(argv)
    os.environ |= ENVIRONMENT
    import torch
    from transformers.utils import logging

    from evidence.gpu import __main__
    from evidence.gpu.bench import Bench, carry_out
    from evidence.speed.benchmark import about

    if options.run == "1":
        from evidence.gpu.trainer_checks import CHECKS
    else:
        from evidence.gpu.engine_checks import CHECKS
    names = [check.name for check in CHECKS]
    if unknown := set(options.only) - set(names):
        parser.error(f"argument --only: run {options.run} has no {', '.join(sorted(unknown))}, but {', '.join(names)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny only tries it out")
    logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = options.output / f"gpu_first_{options.run}.jsonl"
        bench = Bench(Path(folder), options.device, options.tiny, path)
        said = (
            about(torch.get_num_threads()) | __main__.card(options.device) | {"command": sys.argv, "tiny": options.tiny}
        )
        bench.note(**said | ({"commit": options.commit} if options.commit else {}))
        first = CHECKS[0].name if options.run == "2" else ""  # starts the engine, which all others ask
        wanted = [check for check in CHECKS if not options.only or check.name in (first, *options.only)]
        held = carry_out(wanted, bench, options.seconds or SECONDS[options.run])
        bench.close()
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
