"""The measurements of each part of evidence/gpu; every function has a process to itself."""

from __future__ import annotations

import gc
import itertools
import math
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from evidence.speed.ours import Given, as_rollout
from evidence.speed.workloads import Meter, Workload, end_answers
from nanorlhf.engines.base import Completion, Request, Sampling
from nanorlhf.engines.launch import build_engine, engine_name
from nanorlhf.grpo import GRPO, GRPOConfig, GRPOTrainer
from nanorlhf.learning.learner import Part
from nanorlhf.learning.packing import pack
from nanorlhf.loop import Loop
from nanorlhf.memory.plan import Plan
from nanorlhf.memory.planning import plan_run
from nanorlhf.memory.residency import Residency
from nanorlhf.policy import recomputation
from nanorlhf.policy.logprobs import head_of, token_logprobs
from nanorlhf.policy.policy import Policy
from nanorlhf.records.metrics import Averages
from nanorlhf.rollouts.sampler import Sampler
from nanorlhf.system.device import taken
from nanorlhf.types import Rollout

LORA_R, EACH, PROMPT, REPEATS = 16, 8, 64, 3
ROW = 4096  # tokens that parity has pass at once
SMALL = 128  # what --tiny divides lengths by


def options(folder: Path, device: str, **others: Any) -> GRPOConfig:
    """Those that every part shares."""
    shared = {"model_name_or_path": str(folder / "model"), "device": device, "lora_r": LORA_R, "lora_alpha": LORA_R}
    return GRPOConfig(**shared | {"output_dir": str(folder / "run"), "eval_steps": 0, "save_steps": 0} | others)


def timed(work: Callable[[], Any], device: str) -> tuple[float, float | None]:
    """Seconds of the median run after a warm one, and the peak of memory (GiB) over all of them."""
    seconds = []
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + REPEATS):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:]), torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def apart(a: Tensor, b: Tensor) -> dict[str, float]:
    """The distance of two sets of log-probabilities."""
    gap = (a.cpu() - b.cpu()).abs()
    return {"mean_abs": gap.mean().item(), "max_abs": gap.max().item()}


def parity(folder: Path, device: str, tiny: bool, samples: int, tokens: int) -> dict[str, Any]:
    """Log-probabilities of what the engine wrote, by everybody; gradients in every way of keeping activations."""
    from transformers import AutoTokenizer

    samples, tokens = (4, 16) if tiny else (samples, tokens)
    config = options(
        folder, device, engine="hf" if device == "cpu" else "auto", gradient_checkpointing=False, token_budget=ROW,
        max_prompt_length=PROMPT, max_completion_length=tokens, prompts_per_step=samples, num_generations=2,
    )  # fmt: skip
    plan = planned(config) if device == "cuda" else None
    policy = Policy(config)
    policy.verify()
    disturb_adapter(policy)
    tokenizer, sampling = AutoTokenizer.from_pretrained(folder / "model"), Sampling(1.0, tokens, (0,))
    engine = build_engine(config, policy, tokenizer, sampling, folder / "base", plan and plan.engine_cache)
    engine.update(policy)
    asked = requests(samples, tokens)
    rollout = as_written(asked, engine.generate(asked, seed=0))
    engine.close()  # so that peaks are the trainer's own
    packed, alone = (everything(policy, rollout, budget) for budget in (ROW, 1))
    found: dict[str, Any] = {
        "engine": type(engine).__name__,
        "engine_and_trainer": apart(rollout.columns["engine_logprobs"], packed),
        "packed_and_one_by_one": apart(packed, alone),
    }
    return found | gradients(policy, rollout)


def requests(count: int, tokens: int, longest: int = PROMPT) -> list[Request]:
    """Prompts of any tokens, each with a limit of its own up to `tokens`."""
    draw = random.Random(0)
    prompts = [[draw.randrange(2, 500) for _ in range(draw.randint(4, longest))] for _ in range(count)]
    return [Request(i, ids, max_tokens=draw.randint(tokens // 4, tokens)) for i, ids in enumerate(prompts)]


def as_written(asked: Sequence[Request], written: Iterable[Completion]) -> Rollout:
    """The completions that an engine wrote, as the loop takes them."""
    return given((asked[c.id].prompt_ids, c.token_ids, c.logprobs) for c in sorted(written, key=lambda c: c.id))


def made_up(lengths: Sequence[int], prompt: int = 16) -> Rollout:
    """Samples of so many tokens each, their prompts among them."""
    draw = random.Random(0)
    every = [[draw.randrange(2, 500) for _ in range(length)] for length in lengths]
    return given((ids[:prompt], ids[prompt:], [-6.0] * len(ids[prompt:])) for ids in every)


def given(samples: Iterable[tuple[list[int], list[int], list[float]]]) -> Rollout:
    """Prompts, completions and log-probabilities, each sample a group of its own."""
    names = ("prompt_ids", "completion_ids", "logprobs")
    every = [dict(zip(names, sample, strict=True)) | {"reward": 1.0} for sample in samples]
    return as_rollout(every, Workload(generations=1))


def planned(config: GRPOConfig) -> Plan:
    """The memory plan that a run of these options would have."""
    about = AutoConfig.from_pretrained(config.model_name_or_path)
    return plan_run(config, about, GRPO(config), [], engine_name(config))


def disturb_adapter(policy: Policy) -> None:
    """An adapter that does something, of the size that training gives it."""
    draw = torch.Generator().manual_seed(0)
    for _, parameter in sorted(policy.trainable.items()):
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=draw).to(parameter)


def rows(policy: Policy, rollout: Rollout, budget: int) -> Iterator[Any]:
    everyone = torch.ones(len(rollout.samples), dtype=torch.bool)
    weights = torch.full((int(rollout.lengths.sum()),), 1 / int(rollout.lengths.sum()))
    for batch in pack(rollout, everyone, weights, budget):
        yield batch.to(policy.device)


@torch.no_grad()
def everything(policy: Policy, rollout: Rollout, budget: int) -> Tensor:
    """(N,) the trainer's log-probabilities."""
    found = torch.zeros(int(rollout.lengths.sum()))
    for batch in rows(policy, rollout, budget):
        found[batch.tokens] = policy.logprobs(batch)[0].cpu()
    return found


def gradient(policy: Policy, rollout: Rollout) -> tuple[Tensor, dict[str, Any]]:
    """The adapter's gradient, with its time and memory."""

    def work() -> None:
        policy.model.zero_grad(set_to_none=True)
        for batch in rows(policy, rollout, ROW):
            (policy.logprobs(batch)[0] * batch.weights).sum().backward()

    seconds, peak = timed(work, policy.device.type)
    flat = torch.cat([p.grad.flatten().float().cpu() for p in policy.trainable.values() if p.grad is not None])
    return flat, {"seconds": seconds, "peak_gib": peak}


def gradients(policy: Policy, rollout: Rollout) -> dict[str, dict[str, Any]]:
    """The gradient in every way of keeping activations, and how far it lies from the first; twice, for the noise."""
    ways: dict[str, tuple[Literal["off", "on"], int | None]] = {
        "plain": ("off", 0),
        "again": ("off", 0),
        "recomputed": ("off", None),
        "recomputed_and_offloaded": ("on", None),
    }
    found: dict[str, dict[str, Any]] = {}
    expected: Tensor | None = None
    for name, (offload, layers) in ways.items():
        recomputation.recompute(policy.base, offload, policy.device, layers)
        got, figures = gradient(policy, rollout)
        expected = got if expected is None else expected
        found[name] = figures | {"relative_difference": ((got - expected).norm() / expected.norm()).item()}
    return found


def one_row(
    config: GRPOConfig, lengths: Sequence[int], plan: Plan | None = None
) -> tuple[Callable[[], Any], nn.Module]:
    """An optimizer step, there and back, from one row of samples of these lengths, to be called again and again; and
    the model, of which as many layers are recomputed as are planned.
    """
    rollout = made_up(lengths)
    tokens = int(rollout.lengths.sum())
    rollout.columns["advantages"] = torch.ones(tokens)
    policy = Policy(config)
    source: Any = Given(Meter())
    loop = Loop(config, GRPO(config), policy, source, residency=Residency(plan, policy.device))
    everyone = torch.ones(len(lengths), dtype=torch.bool)
    (batch,) = pack(rollout, everyone, torch.full((tokens,), 1 / tokens), sum(lengths))
    row, part = batch.to(policy.device), Part(everyone, tokens, first=False)
    return lambda: loop.learner.learn([row], part, Averages()), policy.model


def trainer_alone(folder: Path, device: str, tiny: bool, tokens: int, offload: str = "auto") -> dict[str, Any]:
    """One row of one sample, there and back, and an optimizer step; every layer recomputed."""
    tokens = tokens // SMALL if tiny else tokens
    config = options(
        folder, device, gradient_checkpointing=True, activation_offload=offload, token_budget=tokens,
        max_prompt_length=16, max_completion_length=tokens - 16, num_generations=2, prompts_per_step=1,
    )  # fmt: skip
    seconds, peak = timed(one_row(config, [tokens])[0], device)
    return {"tokens": tokens, "tokens_per_s": tokens / seconds, "seconds": seconds, "peak_gib": peak}


def coin(completions: Sequence[str], **_: Any) -> list[float | None]:
    """A reward that says nothing, and differs within every group."""
    return [float(zlib.crc32(c.encode()) & 1) for c in completions]


def questions(count: int, letters: int) -> list[dict[str, str]]:
    """Rows of so many letters, each of which is a token."""
    draw = random.Random(0)
    return [{"prompt": "".join(draw.choices("abcdefghij", k=letters))} for _ in range(count)]


def drawn(sampler: Sampler, limit: int) -> None:
    """Has every answer end at a length of its own: log-normal, its median a quarter of the limit."""

    def length(prompt: int, number: int) -> int:
        return max(1, round(limit / 4 * math.exp(random.Random(f"{prompt}/{number % EACH}").gauss(0, 0.8))))

    end_answers(sampler, length)


def ingredients(tiny: bool) -> dict[str, Any]:
    """The arguments that a trainer takes beside its options."""
    from datasets import Dataset

    return {"reward_funcs": coin, "train_dataset": Dataset.from_list(questions(64, 4 if tiny else PROMPT))}


def ours(folder: Path, device: str, tiny: bool, length: int, draw: bool, **others: Any) -> list[dict[str, Any]]:
    """Metrics of a few whole steps of 16 x 8 episodes."""
    prompts, letters = (2, 4) if tiny else (16, PROMPT)
    trainer = GRPOTrainer(
        **ingredients(tiny),
        args=options(
            folder, device, engine="hf" if device == "cpu" else "vllm", prompts_per_step=prompts, num_generations=EACH,
            max_prompt_length=letters, max_completion_length=length, max_steps=1 + REPEATS, keep_rollouts=False,
            **others,
        ),
    )  # fmt: skip
    if draw:
        drawn(trainer.sampler, length)
    return [row for row in trainer.train() if row["step"] > 0]


def steps(folder: Path, device: str, tiny: bool, length: int, gigabytes: float, **others: Any) -> dict[str, Any]:
    """Whole steps held to so much memory: the median of each figure after the first step."""
    length = max(8, length // 1000) if tiny else length
    metrics = ours(folder, device, tiny, length, draw=True, gpu_memory_gib=gigabytes * 1e9 / 2**30, **others)
    kinds = ("time", "memory", "throughput", "tokens", "completion", "age", "partial")
    wanted = [n for n in metrics[0] if n.split("/")[0] in kinds]
    found = {
        n: median(m[n] for m in metrics[1:] if m.get(n) is not None) for n in wanted if metrics[1].get(n) is not None
    }
    return {"episodes": 16 if tiny else 128, "seconds_per_episode": 1 / found["throughput/episodes_per_s"], **found}


def versus_trl(folder: Path, device: str, tiny: bool, length: int, side: str) -> dict[str, Any]:
    """Whole steps of 16 x 8 completions of one length, by ours or by TRL."""
    length = max(8, length // 1000) if tiny else length
    if side == "ours":
        with Watch(device) as watch:
            metrics = ours(folder, device, tiny, length, draw=False)
        return {"seconds_per_step": median(m["time/step"] for m in metrics[1:]), "peak_gib": watch.peak_gib}
    with Watch(device) as watch:
        times = trl_steps(folder, device, tiny, length)
    return {"seconds_per_step": median(b - a for a, b in itertools.pairwise(times[1:])), "peak_gib": watch.peak_gib}


class Watch(threading.Thread):
    """Looks every few milliseconds at how much of the card is taken, CUDA's own part included; None on a CPU."""

    def __init__(self, device: str) -> None:
        super().__init__(daemon=True)
        self.device, self.ended, self.peak_gib = torch.device(device), threading.Event(), None

    def __enter__(self) -> Watch:
        if self.device.type == "cuda":
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.peak_gib = max(self.peak_gib or 0.0, taken(self.device) / 2**30)


def trl_steps(folder: Path, device: str, tiny: bool, length: int) -> list[float]:
    """When each of TRL's steps ended, and before them when the first began."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig as Config  # type: ignore[import-not-found]
    from trl import GRPOTrainer as Trainer  # type: ignore[import-not-found]
    from trl import ModelConfig, get_peft_config  # type: ignore[import-not-found]

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not times:
                times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    cpu, prompts, letters = device == "cpu", 2 if tiny else 16, 4 if tiny else PROMPT
    served: dict[str, Any] = {} if cpu else {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": 0.4,
        "vllm_max_model_length": letters + length, "generation_kwargs": {"ignore_eos": True},
    }  # fmt: skip
    adapter = ModelConfig(
        use_peft=True, lora_r=LORA_R, lora_alpha=LORA_R, lora_dropout=0.0, lora_target_modules=["all-linear"]
    )
    trainer = Trainer(
        model=str(folder / "model"),
        reward_funcs=coin,
        train_dataset=Dataset.from_list(questions(64, letters)),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=get_peft_config(adapter),
        callbacks=[Clock()],
        args=Config(
            output_dir=str(folder / "trl"), use_cpu=cpu, bf16=not cpu, max_steps=1 + REPEATS, learning_rate=1e-5,
            per_device_train_batch_size=8, gradient_accumulation_steps=prompts, gradient_checkpointing=True,
            num_generations=8, max_completion_length=length, beta=0.0, loss_type="dapo", logging_steps=1,
            report_to=[], save_strategy="no", disable_tqdm=True, vllm_importance_sampling_correction=False,
            model_init_kwargs={"dtype": "float32" if cpu else "bfloat16"},
            **served,
        ),
    )  # fmt: skip
    trainer.train()
    return times


def head(folder: Path, device: str, tiny: bool, tokens: int) -> dict[str, Any]:
    """Log-probabilities and entropies of so many tokens, there and back to the hidden states."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    model = model.to(device).requires_grad_(False)
    here, tokens = head_of(model), tokens // SMALL if tiny else tokens
    weight = here.weight
    del model
    gc.collect()
    draw = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, weight.shape[1], generator=draw, device=device, dtype=weight.dtype).requires_grad_()
    targets = torch.randint(len(weight), (tokens,), generator=draw, device=device)
    found: dict[str, Any] = {"tokens": tokens, "vocabulary": len(weight)}
    expected: tuple[Tensor, Tensor] | None = None
    for name, score in scorers(here).items():

        def work(score: Callable[..., tuple[Tensor, Tensor]] = score) -> tuple[Tensor, Tensor]:
            hidden.grad = None
            logprobs, entropy = score(hidden, targets)
            logprobs.sum().backward()
            return logprobs.detach(), entropy.detach()

        seconds, peak = timed(work, device)
        expected = expected or work()
        logprobs, entropy = work()
        gaps = {"logprobs": apart(logprobs.float(), expected[0]), "entropy": apart(entropy.float(), expected[1])}
        found[name] = {"seconds": seconds, "peak_gib": peak, **gaps}
    return found


def scorers(here: Any) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """Ours, and liger-kernel's if it is installed."""

    def fused(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (  # type: ignore[import-not-found]
            LigerFusedLinearScaledCrossEntropyFunction as Fused,
        )

        loss, entropy = Fused.apply(hidden, here.weight, targets, 1.0, -100, 1, True)
        return -loss, entropy

    sides: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "ours": lambda hidden, targets: token_logprobs(hidden, here, targets, 1.0)
    }
    return sides | ({"liger": fused} if find_spec("liger_kernel") else {})
