"""Six short runs whose outcome a change of structure must not touch, to the last bit:

    python -m evidence.survival.same_bits record /tmp/before
    python -m evidence.survival.same_bits record /tmp/after        # after the change
    python -m evidence.survival.same_bits compare /tmp/before /tmp/after

They are of the transformers engine on a CPU: GRPO, PPO, DPO and SFT, one that runs out of memory in its update, and one
of two processes. Bits are those of one machine; another processor sums in another order.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from evidence.survival.compare_runs import differences

SHORT = [
    "--recipe",
    "tiny",
    "--max_steps",
    "3",
    "--prompts_per_step",
    "8",
    "--eval_prompts",
    "16",
    "--seed",
    "5",
    "--device",
    "cpu",
]
WRITES = [*SHORT, "--engine", "hf", "--reward_workers", "0", "--max_completion_length", "32"]
OUT_OF_MEMORY = (
    "import sys; from evidence.survival.same_bits import run_out_of_memory; sys.exit(run_out_of_memory(sys.argv[1:]))"
)
ROWS = 100  # tokens; no longer row fits in the run that runs out of memory
ALONE, MODULE = [sys.executable], ["-m", "nanorlhf"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
RUNS = {
    "grpo": [
        *ALONE,
        *MODULE,
        "grpo",
        *WRITES,
        "--kl_coef",
        "0.05",
        "--updates_per_step",
        "2",
        "--epochs_per_step",
        "2",
    ],
    "ppo": [*ALONE, *MODULE, "ppo", *WRITES, "--value_init_prompts", "16", "--updates_per_step", "2"],
    "dpo": [*ALONE, *MODULE, "dpo", *SHORT],
    "sft": [*ALONE, *MODULE, "sft", *SHORT],
    "out_of_memory": [*ALONE, "-c", OUT_OF_MEMORY, "ppo", *WRITES, "--value_init_prompts", "0"],
    "two_processes": [*TWO, *MODULE, "grpo", *WRITES, "--kl_coef", "0.05"],
}


def main(argv: list[str] | None = None) -> int:
    """Records the runs, or compares two recordings; gives 1 if a run fails or a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("folders", type=Path, nargs="+", help="one to record into, or two to compare")
    args = parser.parse_args(argv)
    if args.what == "record":
        return max(record(name, args.folders[0]) for name in RUNS)
    one, other = args.folders
    found = {name: differences(one / name, other / name) for name in RUNS}
    for name, words in found.items():
        print(f"{name}: {'; '.join(words[:5]) or 'the same bits'}", flush=True)
    return int(any(found.values()))


def record(name: str, folder: Path) -> int:
    """Makes one of the runs; gives its exit status."""
    line = [*RUNS[name], "--output_dir", str(folder / name)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    status = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    print(f"{name}: {'failed' if status else 'recorded'}", flush=True)
    return status


def run_out_of_memory(line: list[str]) -> int:
    """Trains on a machine on which no row of more than so many tokens fits."""
    import torch

    from nanorlhf.__main__ import main as command
    from nanorlhf.policy.policy import Policy

    hidden = Policy.hidden

    def limited(self: Policy, batch: Any, model: Any = None) -> Any:
        if torch.is_grad_enabled() and len(batch.input_ids) > ROWS:
            raise torch.OutOfMemoryError("out of memory: so it was asked for")
        return hidden(self, batch, model)

    Policy.hidden = limited
    return command(line)


if __name__ == "__main__":
    sys.exit(main())
