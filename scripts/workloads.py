"""What the benchmarks work on: a random model, a made-up rollout, and a meter."""

from __future__ import annotations

import json
import math
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanorlhf.types import Rollout

KL, LORA_R, RATE = 0.05, 16, 1e-5

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
    outlier: int = 0  # the longest completion is of this length instead
    flat: int = 0  # so many prompts' completions all earn the same
    kl: float = KL

    @property
    def model(self) -> dict[str, Any]:
        """What transformers' Qwen2Config takes."""
        return {
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
            "max_position_embeddings": 32768,
        }  # fmt: skip

    @property
    def lengths(self) -> list[int]:
        n = self.prompts * self.generations
        normal = [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]
        lengths = [min(self.longest, round(self.median_length * math.exp(self.sigma * z))) for z in normal]
        lengths[-1] = self.outlier or lengths[-1]
        random.Random(0).shuffle(lengths)
        return lengths

    @property
    def limit(self) -> int:
        """Tokens that a completion may have."""
        return max(self.longest, self.outlier)

    def rollout(self) -> list[dict[str, Any]]:
        """Samples with prompts of 16 to 32 tokens and rewards of 0 or 1; those of one prompt are adjacent."""
        draw, samples = random.Random(0), []

        def tokens(n: int) -> list[int]:
            return [draw.randrange(2, self.vocabulary) for _ in range(n)]

        prompts = [tokens(draw.randint(16, 32)) for _ in range(self.prompts)]
        for i, length in enumerate(self.lengths):
            group = i // self.generations
            reward = 1.0 if group < self.flat else float(i % 3 == 0)
            sample = {"prompt_ids": prompts[group], "completion_ids": tokens(length), "reward": reward}
            samples.append(sample | {"logprobs": [-math.log(self.vocabulary)] * length})
        return samples


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


def prepare(folder: Path, work: Workload) -> None:
    """Writes the model and a tokenizer for it."""
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


def as_rollout(samples: Sequence[dict[str, Any]], generations: int) -> Rollout:
    """The same samples as our loop takes them."""
    import torch

    from nanorlhf.types import Prompt, Rollout, Sample

    group = torch.arange(len(samples)) // generations
    return Rollout(
        [Sample(Prompt(i, s["prompt_ids"], "", {}), s["completion_ids"], s["logprobs"], True, "")
         for i, s in zip(group.tolist(), samples, strict=True)],
        group,
        torch.tensor([s["reward"] for s in samples]),
        columns={"engine_logprobs": torch.tensor([x for s in samples for x in s["logprobs"]])},
    )  # fmt: skip


class Given:
    """A source whose rollouts were made elsewhere; the meter starts as one is asked for."""

    def __init__(self, meter: Meter, *rollouts: Rollout) -> None:
        self.meter, self.rollouts = meter, iter(rollouts)

    def rollout(self, step: int, clock: Any, progress: Any) -> Rollout:
        rollout = next(self.rollouts)
        self.meter.start()
        return rollout


def update_ours(folder: Path, work: Workload, samples: Sequence[dict[str, Any]], warm: int = 0) -> Run:
    """One step of our loop from the moment it has its completions; before it, one on `warm` groups."""
    from nanorlhf.grpo import GRPO, GRPOConfig
    from nanorlhf.loop import Loop
    from nanorlhf.policy import Policy

    config = GRPOConfig(
        model_name_or_path=str(folder), device="cpu", lora_r=LORA_R, lora_alpha=LORA_R, kl_coef=work.kl,
        learning_rate=RATE, prompts_per_step=work.prompts, num_generations=work.generations,
        max_completion_length=work.limit,
    )  # fmt: skip
    policy, meter = Policy(config), Meter()
    disturb(policy.model)
    first = [as_rollout(samples[-warm * work.generations :], work.generations)] if warm else []
    loop = Loop(config, GRPO(config), policy, Given(meter, *first, as_rollout(samples, work.generations)))
    for step in range(len(first)):
        loop.step(step + 1)
    metrics = loop.step(len(first) + 1).metrics
    figures = ("loss", "grad_norm", "tokens/trained", "samples/dropped_fraction")
    return meter.stop() | {name: metrics[name] for name in figures}
