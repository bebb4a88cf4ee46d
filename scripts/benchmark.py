"""Measures our update against TRL's on the same rollouts: `python -m scripts.benchmark --only update`.

The update is everything between completions and new weights: reference log-probabilities, forward, backward, optimizer
step. Every measurement has a process of its own, so that its peak of memory is its own, and ours alternate with TRL's,
so that a busy machine slows both. Both start cold and do one update. TRL is measured with every one of its settings
below, and its quickest is compared in time, its smallest in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KL, LORA_R, RATE = 0.05, 16, 1e-5
ALIKE = 1e-3  # losses and gradient norms may differ by this share; float32 sums in another order differ by less
MEASURE = "import sys; from nanorlhf.scripts.benchmark import measure; measure(*sys.argv[1:])"

Run = dict[str, Any]  # what one process measured


@dataclass(frozen=True, slots=True)
class Workload:
    """A Qwen2 model and a rollout, whose lengths are mid-quantiles of a log-normal distribution: no lucky draw."""

    hidden: int = 256
    intermediate: int = 672
    layers: int = 4
    heads: int = 4
    vocabulary: int = 32768
    prompts: int = 4
    generations: int = 8
    median_length: int = 128
    sigma: float = 0.9
    longest: int = 1024

    @property
    def model(self) -> dict[str, Any]:
        """What transformers' Qwen2Config takes."""
        return {
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
        }  # fmt: skip

    @property
    def lengths(self) -> list[int]:
        n = self.prompts * self.generations
        normal = [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]
        lengths = [min(self.longest, round(self.median_length * math.exp(self.sigma * z))) for z in normal]
        random.Random(0).shuffle(lengths)
        return lengths

    def rollout(self) -> list[dict[str, Any]]:
        """Samples with prompts of 16 to 32 tokens and rewards of 0 or 1; those of one prompt are adjacent."""
        draw, samples = random.Random(0), []

        def tokens(n: int) -> list[int]:
            return [draw.randrange(2, self.vocabulary) for _ in range(n)]

        prompts = [tokens(draw.randint(16, 32)) for _ in range(self.prompts)]
        for i, length in enumerate(self.lengths):
            sample = {"prompt_ids": prompts[i // self.generations], "completion_ids": tokens(length)}
            samples.append(sample | {"logprobs": [-math.log(self.vocabulary)] * length, "reward": float(i % 3 == 0)})
        return samples


SIZES = {
    "full": Workload(),
    "tiny": Workload(hidden=16, intermediate=32, layers=1, heads=2, vocabulary=64, median_length=8, longest=32),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Who updates, and how."""

    side: str  # ours, trl, or loaded: the model alone, which both start from
    micro_batch: int = 0
    checkpointing: bool = False

    def __str__(self) -> str:
        if self.side != "trl":
            return self.side
        return f"trl, micro-batch {self.micro_batch}{', checkpointing' * self.checkpointing}"


OURS, LOADED = Setting("ours"), Setting("loaded")
TRL = [Setting("trl", micro_batch, checkpointing) for micro_batch in (8, 32) for checkpointing in (False, True)]


class Meter:
    """Seconds and memory between `start` and `stop`."""

    def start(self) -> None:
        self.baseline, self.cpu, self.wall = memory()[0], time.process_time(), time.perf_counter()

    def stop(self) -> Run:
        """What was used since, and the peak."""
        seconds = {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}
        return seconds | {"baseline_mib": self.baseline, "peak_mib": memory()[1]}


def memory() -> tuple[float, float]:
    """MiB that this process holds now, and the most it ever held."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, which counts in bytes and tells only the peak
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return peak, peak
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())  # ru_maxrss would count the parent's
    return int(fields["VmRSS"].split()[0]) / 1024, int(fields["VmHWM"].split()[0]) / 1024


def disturb(model: Any) -> None:
    """Gives an adapter that is zero so far the same weights on both sides, so that KL and its gradient are not zero."""
    import torch

    draw = torch.Generator().manual_seed(0)
    for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)


def update_ours(folder: Path, work: Workload, samples: list[dict[str, Any]]) -> Run:
    """One step of our loop from the moment it has its completions."""
    import torch

    from nanorlhf.grpo import GRPO, GRPOConfig
    from nanorlhf.loop import Loop
    from nanorlhf.policy import Policy
    from nanorlhf.types import Prompt, Rollout, Sample

    meter, group = Meter(), torch.arange(work.prompts).repeat_interleave(work.generations)
    rollout = Rollout(
        [Sample(Prompt(i, s["prompt_ids"], "", {}), s["completion_ids"], s["logprobs"], True, "")
         for i, s in zip(group.tolist(), samples, strict=True)],
        group,
        torch.tensor([s["reward"] for s in samples]),
        columns={"engine_logprobs": torch.tensor([x for s in samples for x in s["logprobs"]])},
    )  # fmt: skip

    class Given:
        def rollout(self, step: int, clock: Any, progress: Any) -> Rollout:
            meter.start()
            return rollout

    config = GRPOConfig(
        model_name_or_path=str(folder), device="cpu", lora_r=LORA_R, lora_alpha=LORA_R, kl_coef=KL, learning_rate=RATE,
        prompts_per_step=work.prompts, num_generations=work.generations, max_completion_length=work.longest,
    )  # fmt: skip
    policy = Policy(config)
    disturb(policy.model)
    step = Loop(config, GRPO(config), policy, Given()).step(1)
    return meter.stop() | {name: step.metrics[name] for name in ("loss", "grad_norm")}


def update_trl(folder: Path, work: Workload, samples: list[dict[str, Any]], setting: Setting) -> Run:
    """One step of TRL's GRPOTrainer from the moment it has its completions; float32 and token mean, as ours."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config  # type: ignore[import-not-found]

    meter, measured = Meter(), {}

    def given(*_: Any) -> dict[str, list[Any]]:
        columns = {name: [s[name] for s in samples] for name in samples[0]}
        meter.start()
        return columns

    class AtTheEnd(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            measured.update(meter.stop())

    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda reward, **_: reward,
        rollout_func=given,
        train_dataset=Dataset.from_dict({"prompt": ["w2"] * work.prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=get_peft_config(
            ModelConfig(
                use_peft=True, lora_r=LORA_R, lora_alpha=LORA_R, lora_dropout=0.0, lora_target_modules=["all-linear"]
            )
        ),
        callbacks=[AtTheEnd()],
        args=GRPOConfig(
            output_dir=str(folder / "trl"), use_cpu=True, bf16=False, max_steps=1, learning_rate=RATE,
            per_device_train_batch_size=setting.micro_batch,
            gradient_accumulation_steps=len(samples) // setting.micro_batch,
            gradient_checkpointing=setting.checkpointing,
            num_generations=work.generations, max_completion_length=work.longest,
            beta=KL, use_bias_correction_kl=False, loss_type="dapo", scale_rewards="group",
            logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    disturb(trainer.model)
    trainer.train()
    return measured | {name: trainer.state.log_history[0][name] for name in ("loss", "grad_norm")}


def load_only(folder: Path) -> Run:
    """The memory that the libraries and the model take before anyone trains it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {"baseline_mib": memory()[0], "parameters": model.num_parameters()}


def measure(folder: str, size: str, setting: str, threads: str) -> None:
    """What a process of its own does: one update, its figures into `folder`."""
    import torch

    torch.set_num_threads(int(threads))
    path, work, how = Path(folder), SIZES[size], Setting(**json.loads(setting))
    samples = json.loads((path / "rollout.json").read_text())
    if how == LOADED:
        run = load_only(path)
    else:
        run = update_ours(path, work, samples) if how == OURS else update_trl(path, work, samples, how)
    (path / "run.json").write_text(json.dumps(run))


def prepare(folder: Path, work: Workload) -> None:
    """Writes the model, a tokenizer for it and the rollout."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**work.model)).save_pretrained(folder)
    words = models.WordLevel({f"w{i}": i for i in range(work.vocabulary)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w0", pad_token="w1").save_pretrained(folder)
    (folder / "rollout.json").write_text(json.dumps(work.rollout()))


def in_a_process(folder: Path, size: str, setting: Setting, threads: int) -> Run:
    """One measurement; what the process said is shown only if it failed."""
    command = [sys.executable, "-c", MEASURE, str(folder), size, json.dumps(asdict(setting)), str(threads)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{setting} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    run = {"setting": str(setting)} | json.loads((folder / "run.json").read_text())
    if "seconds" in run:
        grown = run["peak_mib"] - run["baseline_mib"]
        print(f"{setting}: {run['seconds']:.1f} s, {grown:,.0f} MiB above the start", flush=True)
    return run


def summarise(runs: list[Run], common_mib: float) -> dict[str, Any]:
    """Medians of every setting, and ratios of ours to TRL's best in time and in each view of memory."""
    medians: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run["setting"] for run in runs):
        mine = [run for run in runs if run["setting"] == name]
        peaks = [run["peak_mib"] for run in mine]
        medians[name] = {
            "seconds": median(run["seconds"] for run in mine),
            "cpu_seconds": median(run["cpu_seconds"] for run in mine),
            "above_start_mib": median(run["peak_mib"] - run["baseline_mib"] for run in mine),
            "above_loaded_mib": median(peaks) - common_mib,
            "peak_mib": median(peaks),
        }
    ours = medians[str(OURS)]
    others = {name: figures for name, figures in medians.items() if name != str(OURS)}
    best = {what: min(others, key=lambda name: others[name][what]) for what in ours if others}
    times = {what: others[best[what]][what] / ours[what] for what in best}
    return {"medians": medians, "trl_best": best, "trl_over_ours": times}


def agreement(runs: list[Run]) -> dict[str, float]:
    """The largest relative difference of any run from the first."""
    return {name: max(abs(run[name] / runs[0][name] - 1) for run in runs) for name in ("loss", "grad_norm")}


def table(report: dict[str, Any]) -> str:
    """The medians as a table, and what follows from them."""
    heads = ("seconds", "cpu_seconds", "above_start_mib", "above_loaded_mib", "peak_mib")
    rows: list[tuple[str, ...]] = [("", "seconds", "CPU seconds", "MiB above start", "above loaded model", "in all")]
    for name, figures in report["medians"].items():
        rows.append((name, *(f"{figures[h]:,.1f}" if "seconds" in h else f"{figures[h]:,.0f}" for h in heads)))
    ratios = report["trl_over_ours"]
    if ratios:
        rows.append(("TRL's best / ours", *(f"{ratios[h]:.1f}" for h in heads)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    ]
    differs = ", ".join(f"{name} {value:.1e}" for name, value in report["agreement"].items())
    return "\n".join([*lines, f"largest relative difference of any run from the first: {differs}"])


def about(threads: int) -> dict[str, Any]:
    """When, where and with which versions."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", cpuinfo)
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    machine = {
        "cpu": found[1] if found else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
    }
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "commit": commit or "unknown", "machine": machine, "versions": versions}


def update(options: argparse.Namespace) -> dict[str, Any]:
    """The benchmark of the update."""
    work = SIZES[options.size]
    rivals = [] if options.alone else TRL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, work)

        def one(setting: Setting) -> Run:
            return in_a_process(folder, options.size, setting, options.threads)

        loaded, runs = one(LOADED), []
        for _ in range(options.repeats):
            for rival in rivals or [OURS]:
                runs += [one(OURS), one(rival)] if rivals else [one(OURS)]
    lengths = work.lengths
    workload = asdict(work) | {
        "parameters": loaded["parameters"], "completion_tokens": sum(lengths), "longest_completion": max(lengths),
        "lora_r": LORA_R, "kl_coef": KL,
    }  # fmt: skip
    figures = summarise(runs, loaded["baseline_mib"]) | {"agreement": agreement(runs)}
    return {"workload": workload, "loaded_mib": loaded["baseline_mib"]} | figures | {"runs": runs}


BENCHMARKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"update": update}


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table and writes results/benchmark_<name>.json; 1 where the two sides do not agree."""
    parser = argparse.ArgumentParser(prog="nanorlhf benchmark", description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, default=None, help="One benchmark (default: all).")
    parser.add_argument("--repeats", type=int, default=3, help="Measurements of each setting (default: 3).")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="For both sides (default: all cores).")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny only shows that it works.")
    parser.add_argument("--alone", action="store_true", help="Measure our side only, without TRL.")
    parser.add_argument("--output", type=Path, default=Path("results"), help="Folder (default: results).")
    options = parser.parse_args(argv)
    if not options.alone and find_spec("trl") is None:
        print("nanorlhf benchmark: error: TRL is not installed: pip install -e .[bench], or --alone", file=sys.stderr)
        return 2
    agreed = True
    for name in [options.only] if options.only else BENCHMARKS:
        report: dict[str, Any] = {"benchmark": name} | about(options.threads) | BENCHMARKS[name](options)
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"benchmark_{name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{table(report)}\n-> {path}")
        agreed &= all(difference < ALIKE for difference in report["agreement"].values())
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
