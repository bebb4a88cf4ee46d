"""The material of the benchmarks: a random model, prompts, a made-up rollout, and a meter."""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

KL, LORA_R, RATE = 0.05, 16, 1e-5
REFRESHES = 10  # that a process measures, after one that warms up
EXAMPLES = (
    "Give the number alone, between answer tags, as the two examples below do.\n\n"
    "Question: what is 3 + 5?\nAnswer: <answer>8</answer>\n\nQuestion: what is 9 + 4?\nAnswer: <answer>13</answer>\n\n"
)

Run = dict[str, Any]  # what one process measured


@dataclass(frozen=True, slots=True)
class Workload:
    """A Qwen2 model and a rollout, whose lengths are mid-quantiles of a log-normal distribution: no lucky draw.

    `pretrained` names a real model to take instead, whose whole steps begin from sums with worked examples.
    For DPO the first of a prompt's two answers is the better one, for SFT every answer is a demonstration.
    """

    algorithm: str = "grpo"
    hidden: int = 256
    intermediate: int = 672
    layers: int = 4
    heads: int = 4
    vocabulary: int = 32768
    pretrained: str = ""
    prompts: int = 4
    generations: int = 8
    prompt_lengths: tuple[int, int] = (16, 32)  # from, to
    common: int = 0  # tokens with which every prompt begins, as worked examples are
    steps: int = 3  # whole ones, which a process measures after one that warms up
    median_length: int = 128
    sigma: float = 0.9
    longest: int = 1024
    outlier: int = 0  # the longest completion is of this length instead
    flat: int = 0  # so many prompts' completions all earn the same
    kl: float = KL

    @property
    def model(self) -> dict[str, Any]:
        """The arguments of transformers' Qwen2Config."""
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
    def longest_prompt(self) -> int:
        return self.prompt_lengths[1]

    @property
    def limit(self) -> int:
        """Tokens that a completion may have."""
        return max(self.longest, self.outlier)

    @property
    def texts(self) -> list[str]:
        """The rollout's prompts in words, or sums for a model that knows them."""
        if self.pretrained:
            draw = random.Random(0)
            sums = [(draw.randrange(10), draw.randrange(10)) for _ in range(self.prompts)]
            return [f"{EXAMPLES}Question: what is {a} + {b}?\nAnswer: <answer>" for a, b in sums]
        samples = self.rollout()[:: self.generations]
        return [" ".join(f"w{token}" for token in sample["prompt_ids"]) for sample in samples]

    def rollout(self) -> list[dict[str, Any]]:
        """Samples with prompts of random tokens and rewards of 0 or 1; those of one prompt are adjacent."""
        draw, samples = random.Random(0), []

        def tokens(n: int) -> list[int]:
            return [draw.randrange(2, self.vocabulary) for _ in range(n)]

        prompts = [tokens(draw.randint(*self.prompt_lengths)) for _ in range(self.prompts)]
        prompts = [prompts[0][: self.common] + prompt[self.common :] for prompt in prompts]
        for i, length in enumerate(self.lengths):
            group = i // self.generations
            reward = 1.0 if group < self.flat else float(i % (2 if self.algorithm == "dpo" else 3) == 0)
            sample = {"prompt_ids": prompts[group], "completion_ids": tokens(length), "reward": reward}
            samples.append(sample | {"logprobs": [-math.log(self.vocabulary)] * length})
        return samples


@dataclass(frozen=True, slots=True)
class Setting:
    """A side of a contest, and how it works."""

    side: str  # ours, trl, or loaded: the model alone, which both start from
    micro_batch: int = 0  # in completions
    checkpointing: bool = False
    padding_free: bool = False
    engine: str = ""  # who writes completions, if that is not the side's own choice
    sync: str = ""  # how weights reach our engine, if that is not its own choice
    token_budget: int = 0  # of our rows, if that is not our own choice
    seed: int = 0

    def __str__(self) -> str:
        words = [self.side, f"micro-batch {self.micro_batch}" * (self.micro_batch > 0)]
        words += [f"rows of {self.token_budget} tokens" * (self.token_budget > 0)]
        words += ["checkpointing" * self.checkpointing, "padding-free" * self.padding_free, self.engine, self.sync]
        return ", ".join(filter(None, words))


OURS = Setting("ours")


def spread_out(completions: list[Any], **_: Any) -> list[float | None]:
    """A reward that costs nothing and differs within a group."""
    return [float(sum(map(ord, str(completion))) % 3) for completion in completions]


class Meter:
    """Seconds and memory between `start` and `stop`."""

    def start(self) -> None:
        self.baseline = memory()[0]
        self.go()

    def go(self) -> None:
        """Begins to measure anew; earlier use does not count."""
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def lap(self) -> Run:
        """The time used since `start`, `go` or the last lap."""
        seconds = {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}
        self.go()
        return seconds

    def stop(self) -> Run:
        """The same, and the peak."""
        return self.lap() | self.peak()

    def peak(self) -> Run:
        return {"baseline_mib": self.baseline, "peak_mib": memory()[1]}


def aligned(rows: Sequence[Sequence[str]], names: bool) -> list[str]:
    """Lines of cells under one another, flush right; `names` in the first column flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.rjust(w) if i or not names else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def typical(laps: list[Run]) -> Run:
    """The medians."""
    return {name: median(lap[name] for lap in laps) for name in laps[0]}


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
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    from nanorlhf.config.names import shipped_model

    logging.disable_progress_bar()
    if work.pretrained:
        shutil.copytree(shipped_model(work.pretrained), folder, dirs_exist_ok=True)
        (folder / "rollout.json").write_text(json.dumps(work.rollout()))
        return
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**work.model)).save_pretrained(folder)
    words = models.WordLevel({f"w{i}": i for i in range(work.vocabulary)}, unk_token="w0")
    tokens = Tokenizer(words)
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="w0", pad_token="w1").save_pretrained(folder)
    (folder / "rollout.json").write_text(json.dumps(work.rollout()))


def end_answers(sampler: Any, length: Callable[[int, int], int]) -> None:
    """Has each answer end at a length of its own, by its prompt and its number; one that was cut off gets the rest."""
    plain = sampler.request

    def request(number: int, sample: Any, greedy: bool, limit: int) -> Any:
        return plain(number, sample, greedy, min(limit, length(sample.prompt.index, number)))

    sampler.request = request
