"""Steps that wait for their longest answer against steps that do not: `python -m evidence.learning.partial_rollouts`.

A small random model earns the share of its words whose embedding begins with a positive number, which is half of them:
there is something to learn at every length. How long an answer may be is drawn by prompt and number, with a tail, the
mean a sixth of the longest. Both sides train on as many samples, from the same prompts; three seeds.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM

from evidence.results import RESULTS, where, write
from evidence.speed.workloads import Workload, aligned, end_answers, prepare
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.records.directory import RunRecord, read_run
from nanorlhf.scripts.comparing.verdicts import Run, read, verdicts

WORDS, LONGEST, EACH, RATE = 2048, 768, 8, 2.5e-3
MODEL: dict[str, Any] = {"hidden": 64, "intermediate": 160, "layers": 2, "heads": 2, "vocabulary": WORDS}
SIDES: dict[str, dict[str, Any]] = {"waiting": {}, "partial": {"partial_rollouts": 0.5}}
WARM = 3  # steps that do not count in the times: those in which nothing was carried over yet
SIZES = {"full": {"steps": 120, "longest": LONGEST, "prompts": 4}, "tiny": {"steps": 4, "longest": 24, "prompts": 2}}


def written_model(folder: Path) -> list[bool]:
    """Writes a model that is not indifferent to words, and says which of these earn something."""
    prepare(folder, Workload(**MODEL))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    words = model.get_input_embeddings().weight.data.mul_(10)
    model.save_pretrained(folder)
    return (words[:, 0] > 0).tolist()


def earning(good: Sequence[bool]) -> Callable[..., list[float]]:
    """The reward: the share of good words."""

    def share(completion_ids: Sequence[Sequence[int]]) -> list[float]:
        return [fmean(good[word] for word in words) for words in completion_ids]

    return share


def length_of(prompt: int, number: int, longest: int) -> int:
    """The tokens that an answer may have: log-normal, the median a tenth of the longest, the mean about a sixth."""
    draw = random.Random(f"{prompt}/{number}")
    return min(longest, max(1, round(longest / 10 * math.exp(draw.gauss(0, 1)))))


def trained(folder: Path, good: Sequence[bool], side: str, seed: int, engine: Any, size: dict[str, int]) -> RunRecord:
    """A run of one side, in a folder of its own."""
    run = folder / f"{side}-{seed}"
    prompts = [" ".join(f"w{random.Random(f'{i}/{k}').randrange(2, WORDS)}" for k in range(4)) for i in range(512)]
    args = GRPOConfig(
        model_name_or_path=str(folder), output_dir=str(run), device="cpu", engine=engine, seed=seed, lora_r=16,
        max_prompt_length=8, max_completion_length=size["longest"], prompts_per_step=size["prompts"],
        num_generations=EACH, max_steps=size["steps"], learning_rate=RATE, lr_scheduler_type="constant",
        importance_correction="token", reward_workers=0, eval_steps=max(size["steps"] // 12, 1), eval_prompts=32,
        save_steps=0, keep_rollouts=False, report_to=[], **SIDES[side],
    )  # fmt: skip
    rows = [{"prompt": prompt} for prompt in prompts]
    trainer = GRPOTrainer(
        reward_funcs=earning(good), args=args, train_dataset=Dataset.from_list(rows[:448]),
        eval_dataset=Dataset.from_list(rows[448:]),
    )  # fmt: skip
    end_answers(trainer.sampler, lambda prompt, number: length_of(prompt, number % EACH, size["longest"]))
    trainer.train()
    return read_run(run)


def facts(record: RunRecord) -> dict[str, Any]:
    """The figures of a run that are kept."""
    steps = record.steps[WARM:] or record.steps
    lengths = [row["completion/length_mean"] for row in record.steps]
    found = {
        "step_seconds": fmean(row["time/step"] for row in steps),
        "rollout_seconds": fmean(row["time/rollout"] for row in steps),
        "tail_fraction": fmean(row["throughput/tail_fraction"] for row in steps),
        "mean_over_longest": fmean(lengths) / max(row["completion/length_max"] for row in record.steps),
        "held_out": [row["eval/reward"] for row in record.rows if "eval/reward" in row],
    }
    if "age/old_fraction" not in steps[-1]:
        return found
    weights = [w for row in steps if (w := row.get("importance/old_weight_mean")) is not None]
    ages = [age for row in steps if (age := row["age/old_mean"]) is not None]
    return found | {
        "old_fraction": fmean(row["age/old_fraction"] for row in steps),
        "old_age": fmean(ages) if ages else None,
        "oldest": max(row["age/max"] for row in steps),
        "old_weight": fmean(weights) if weights else None,
        "carried": fmean(row["partial/carried"] for row in steps),
    }


def main(argv: list[str] | None = None) -> int:
    """Trains, writes results/partial_rollouts.json, prints a table and what may be said of the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny only shows that it works")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "partial_rollouts.json", help="default: %(default)s")
    options = parser.parse_args(argv)
    runs: list[Run] = []
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        good = written_model(Path(name))
        for seed in range(options.seeds):
            for side in SIDES:
                record = trained(Path(name), good, side, seed, options.engine, SIZES[options.size])
                runs.append(read(record, side, ""))
                found[side].append({"seed": seed} | facts(record))
    times = {side: median(run["step_seconds"] for run in each) for side, each in found.items()}
    words = verdicts(runs)
    report = {"engine": options.engine, "size": options.size, "speedup": times["waiting"] / times["partial"]}
    write(options.output, where() | report | {"verdicts": words, "runs": found})
    cells = [("", "step, s", "tail", "held out")]
    for side, each in found.items():
        tail, last = fmean(run["tail_fraction"] for run in each), fmean(run["held_out"][-1] for run in each)
        cells.append((side, f"{times[side]:.3g}", f"{tail:.2f}", f"{last:.3f}"))
    print("\n".join([*aligned(cells, names=True), f"{report['speedup']:.2f} times as fast a step", *words]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
