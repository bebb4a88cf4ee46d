"""Does a long run stay as it began? Memory, open files and the time of a step, over thousands of steps.

    python -m evidence.survival.soak
    python -m evidence.survival.soak --engine hf --steps 500

A model of a few thousand weights that hardly learns, so that every step has the same work; reward workers, evaluations,
checkpoints, rollouts on disk and a tracker take part as in any run. The first tenth is left out; of the rest, medians
of quarters are compared. Processes are read from /proc, so Linux only. Writes results/soak.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from evidence.results import RESULTS, where, write
from evidence.survival.kills import descendants
from nanorlhf.config.names import shipped_model

STEPS = {"hf": 3000, "vllm": 1500}
WARM_UP = 0.1  # of the steps
EVERY = 10  # steps from one look at the processes to the next
SAVE = 25  # the first checkpoint is warm-up too: it loads what draws pictures
LIMITS = {"rss_mib": 0.02, "handles": 0.0, "cpu_seconds": 0.1}  # by which the last quarter may exceed the first


@dataclass(slots=True)
class Course:
    """The course of a run from step to step: some of it at every step, some only now and then."""

    every: int
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of the trainer: others on this machine do not count
    rss_mib: list[float] = field(default_factory=list)  # of the trainer and its processes
    heap_mib: list[float] = field(default_factory=list)  # the part of it that is no file's
    handles: list[float] = field(default_factory=list)
    processes: list[float] = field(default_factory=list)

    def look(self) -> None:
        """At this process and all below it."""
        pids = [os.getpid(), *(pid for pid, _ in descendants(os.getpid()))]
        sizes = [kibibytes(pid) for pid in pids]
        self.rss_mib.append(sum(rss for rss, _ in sizes) / 1024)
        self.heap_mib.append(sum(heap for _, heap in sizes) / 1024)
        self.handles.append(sum(map(handles, pids)))
        self.processes.append(len(pids))


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes; gives 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=STEPS, help="(default: both, each in a process of its own)")
    parser.add_argument("--steps", type=int, help="(default: 3,000 with hf, 1,500 with vllm)")
    parser.add_argument("--output", type=Path, default=RESULTS / "soak.json")
    args = parser.parse_args(argv)
    if not args.engine:
        words = [sys.executable, "-m", "evidence.survival.soak", *(sys.argv[1:] if argv is None else argv), "--engine"]
        return max(subprocess.run([*words, engine], check=False).returncode for engine in STEPS)
    began, steps = time.monotonic(), args.steps or STEPS[args.engine]
    with tempfile.TemporaryDirectory() as folder:
        course = run(Path(folder), args.engine, steps)
    figures = {"steps": steps, "seconds": time.monotonic() - began} | summary(course)
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    known[args.engine] = figures | where()
    write(args.output, known)
    print(json.dumps(figures, indent=1))
    return int(not figures["flat"])


def run(folder: Path, engine: Any, steps: int) -> Course:
    """A run of so many steps, looked at on its way."""
    from nanorlhf.grpo import GRPOConfig, GRPOTrainer

    write_model(folder / "model")
    config = GRPOConfig(
        model_name_or_path=str(folder / "model"),
        dataset_name="arithmetic",
        dataset_test_split="test",
        engine=engine,
        device="cpu",
        prompts_per_step=4,
        num_generations=4,
        max_prompt_length=32,
        max_completion_length=8,
        learning_rate=1e-6,
        max_steps=steps,
        eval_steps=SAVE,
        eval_prompts=8,
        save_steps=SAVE,
        reward_workers=1,
        report_to=[name for name in ("tensorboard",) if importlib.util.find_spec(name)],
        output_dir=str(folder / "run"),
    )
    trainer, course = GRPOTrainer(reward_funcs=even, args=config), Course(EVERY)
    try:
        before, cpu = time.perf_counter(), time.process_time()
        for number, _ in enumerate(trainer.steps(), 1):
            course.seconds.append(time.perf_counter() - before)
            course.cpu_seconds.append(time.process_time() - cpu)
            if number % EVERY == 0:
                course.look()
            before, cpu = time.perf_counter(), time.process_time()
    finally:
        trainer.close()
    return course


def even(completion_ids: list[list[int]]) -> list[float]:
    """The share of tokens with an even number: something that every group differs in."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def write_model(folder: Path) -> None:
    """A model of one layer with random weights, and the shipped model's tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shutil.copytree(shipped_model("nanorlhf:adder"), folder)
    known = json.loads((folder / "config.json").read_text())
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    same = {
        name: known[name] for name in ("vocab_size", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype")
    }
    torch.manual_seed(0)
    config = Qwen2Config(**size, **same, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def summary(course: Course) -> dict[str, Any]:
    """Medians of quarters, by how much the last exceeds the first, and whether that is little enough."""
    plain, saving = [], []
    for number, seconds in enumerate(course.cpu_seconds, 1):
        (plain if number % SAVE else saving).append(seconds)
    names = ("seconds", "rss_mib", "heap_mib", "handles", "processes")
    values = {"cpu_seconds": plain, "cpu_seconds_with_checkpoint": saving}
    medians = {name: quarters(course_of) for name, course_of in values.items() if len(course_of) >= 5}
    medians |= {name: quarters(getattr(course, name)) for name in names}
    growth = {name: last / first - 1 for name, (first, *_, last) in medians.items()}
    return {
        "flat": all(growth[name] <= limit for name, limit in LIMITS.items()),
        "limits": LIMITS,
        "last_quarter_over_first": growth,
        "medians_of_quarters": medians,
    }


def quarters(values: Sequence[float]) -> list[float]:
    """Medians of the four quarters of what comes after the warm-up."""
    warm = values[round(len(values) * WARM_UP) :]
    bounds = [round(len(warm) * part / 4) for part in range(5)]
    return [median(warm[start:end]) for start, end in pairwise(bounds)]


def kibibytes(pid: int) -> tuple[int, int]:
    """A process's resident memory, and what of it is no file's; nothing of one that has just ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["Rss"].split()[0]), int(fields["Anonymous"].split()[0])
    return 0, 0


def handles(pid: int) -> int:
    """Open files, sockets and pipes of a process."""
    with suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
