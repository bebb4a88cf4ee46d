"""Checks on a card without vLLM: kernels, moves, gradients, one row of a 1.5B model; run 1 of first.py."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from evidence.gpu import parts
from evidence.gpu.bench import Bench, Check, in_gib
from evidence.speed.ours import Given
from evidence.speed.workloads import Meter
from nanorlhf.grpo import GRPO, GRPOTrainer
from nanorlhf.loop import Loop
from nanorlhf.memory.activation_sizes import Family
from nanorlhf.memory.plan import BUS, Plan
from nanorlhf.memory.residency import Offloadable
from nanorlhf.policy import lora
from nanorlhf.policy.attention import packed_attention
from nanorlhf.policy.loading import speed_up
from nanorlhf.policy.policy import Policy
from nanorlhf.segments import Segments
from nanorlhf.system.device import CONTEXT, GIB, taken

HEADS = [(12, 2, None), (16, 8, None), (8, 8, 256), (12, 2, 256)]  # of queries, of keys and values; window
FAMILIES: list[Family] = [(1000, [24]), (7, [30]), (515, [64, 1, 300]), (1, [5])]  # prompts, and answers to each
ROUNDED, ANOTHER_ORDER = 0.02, 0.05  # relative differences that bfloat16 accounts for, the latter in whole models
KERNELS = 25  # in the profile


def probe(bench: Bench) -> None:
    """The machine: compilers, what CUDA takes for itself, pinned memory and how fast it is."""
    bench.note(tools={name: shutil.which(name) for name in ("gcc", "nvcc", "nvidia-smi")})
    bench.note(main_memory=Path("/proc/meminfo").read_text().split("\n")[2])
    if bench.device == "cuda":
        if shutil.which("nvidia-smi"):
            asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv,noheader"]
            bench.note(card=subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip())
        others = taken(torch.device("cuda")) - torch.cuda.memory_reserved()
        bench.note(**in_gib(cuda_takes=others, planned=CONTEXT))
    there = torch.ones((1 << 16) if bench.tiny else 2 * GIB, dtype=torch.uint8, device=bench.device)
    start = time.perf_counter()
    (home,) = Offloadable(list).places([there])
    bench.note(pinning_seconds=time.perf_counter() - start, **in_gib(pinned=home.nbytes))
    for name, target, source in (("to main memory", home, there), ("to the card", there, home)):
        seconds, _ = parts.timed(partial(target.copy_, source, non_blocking=True), bench.device)
        bench.note(copying=name, gb_per_s=home.nbytes / seconds / 1e9, planned=BUS / 1e9)
    start = time.perf_counter()
    compiled = torch.compile(lambda x: x.sin() + 1, backend="inductor" if bench.device == "cuda" else "eager")
    compiled(torch.ones(64, device=bench.device))
    bench.note(compiling_seconds=time.perf_counter() - start)


def attention(bench: Bench) -> None:
    """Packed attention against SDPA in float32 with an explicit mask, there and back."""
    cuda, small = bench.device == "cuda", 32 if bench.tiny else 1
    families = [(-(-prompt // small), [-(-n // small) for n in answers]) for prompt, answers in FAMILIES]
    tokens = sum(prompt + sum(answers) for prompt, answers in families)
    dtype = torch.bfloat16 if cuda else torch.float32
    draw = torch.Generator(bench.device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, 128, generator=draw, device=bench.device, dtype=dtype)

    for heads, shared, window in HEADS:
        width = window and window // small
        inputs = [normal(h, tokens).requires_grad_() for h in (heads, shared, shared)]
        into = normal(heads, tokens)
        got = there_and_back(partial(packed, families=families, window=width), inputs, into)
        exact = [x.detach().float().requires_grad_() for x in inputs]
        mask = visible(families, width, bench.device)
        by_mask = partial(functional.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
        expected = there_and_back(by_mask, exact, into.float())
        off = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))
        bench.within(ROUNDED, relative_difference=off, heads=heads, shared=shared, window=width)
    tokens = 10448 // small
    q, k, v = (normal(h, tokens).requires_grad_() for h in (12, 2, 2))
    into = normal(12, tokens)
    run = partial(packed, families=[(tokens, [0])], window=None)
    seconds, peak = parts.timed(lambda: there_and_back(run, [q, k, v], into), bench.device)
    bench.note(tokens=tokens, seconds=seconds, peak_gib=peak)


def packed(q: Tensor, k: Tensor, v: Tensor, families: Sequence[Family], window: int | None) -> Tensor:
    """Attention as packed rows have it, (1, heads, T, D)."""
    here, segments = nn.Identity(), Segments.of(families).to(q.device)
    how: dict[str, Any] = {"scaling": q.shape[-1] ** -0.5, "sliding_window": window, "segments": segments}
    return packed_attention(here, q, k, v, None, **how)[0].transpose(1, 2)


def visible(families: Sequence[Family], window: int | None, device: str) -> Tensor:
    """(T, T) which keys each query sees: its prompt's and its own that are not to come, and not too long ago."""
    owner, answer, place = [], [], []
    for number, (prompt, answers) in enumerate(families):
        for part, (first, length) in enumerate([(0, prompt), *((prompt, n) for n in answers)]):
            owner += [number] * length
            answer += [part] * length
            place += range(first, first + length)
    family, part, at = (torch.tensor(x, device=device) for x in (owner, answer, place))
    back = at[:, None] - at
    mask = (family[:, None] == family) & ((part[:, None] == part) | (part == 0)) & (back >= 0)
    return mask if window is None else mask & (back < window)


def there_and_back(run: Callable[..., Tensor], inputs: list[Tensor], into: Tensor) -> list[Tensor]:
    """The output, and the gradient of each input."""
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, into)]


def residency(bench: Bench) -> None:
    """Three optimizer steps end in the same weights and moments, whether or not these leave the card in between."""
    stayed, moved = stepped(bench, moves=False), stepped(bench, moves=True)
    off = max((a.float() - b.float()).abs().max().item() for a, b in zip(stayed, moved, strict=True))
    bench.within(0, largest_difference=off, tensors=len(stayed))


def stepped(bench: Bench, moves: bool) -> list[Tensor]:
    """The weights that learn, and their moments, after three steps with the same gradients."""
    config = parts.options(bench.model("Qwen3-0.6B", layers=4), bench.device)
    torch.manual_seed(0)
    policy = Policy(config)
    source: Any = Given(Meter())
    loop = Loop(config, GRPO(config), policy, source)
    units, seconds = [Offloadable(policy.tensors), Offloadable(loop.moments)], 0.0
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        for p in policy.trainable.values():
            p.grad = torch.randn(p.shape, generator=draw).to(p)
        loop.learner.optimizer.step()
        start = time.perf_counter()
        for unit in units if moves else ():
            unit.leave()
        for unit in units if moves else ():
            unit.enter(policy.device)
        torch.cuda.synchronize() if bench.device == "cuda" else None
        seconds += time.perf_counter() - start
    if moves:
        bench.note(seconds=seconds, **in_gib(moved=3 * sum(t.nbytes for unit in units for t in unit.tensors)))
    return [t.detach().cpu() for t in (*policy.trainable.values(), *loop.moments())]


def gradients(bench: Bench) -> None:
    """The gradient, plain, plain again, with layers recomputed and with their inputs in main memory."""
    config = parts.options(bench.model("Qwen3-0.6B", layers=4), bench.device, gradient_checkpointing=False)
    policy = Policy(config)
    parts.disturb_adapter(policy)
    found = parts.gradients(policy, parts.made_up([24, 20] if bench.tiny else [1024, 900, 300, 1500, 200]))
    for way, figures in found.items():
        bench.note(way=way, **figures)
    bench.within(ANOTHER_ORDER, relative_difference=max(f["relative_difference"] for f in found.values()))


def adapters(bench: Bench) -> None:
    """LoRA as one function against PEFT's own forward: log-probabilities, gradient, time and memory."""
    config = parts.options(bench.model("Qwen2.5-1.5B", layers=4), bench.device, gradient_checkpointing=False)
    policy = Policy(config)
    parts.disturb_adapter(policy)
    rollout = parts.made_up([24, 20] if bench.tiny else [2048, 1500, 500])
    results = []
    for way in ("ours", "PEFT's"):
        logprobs = parts.everything(policy, rollout, parts.ROW)
        gradient, figures = parts.gradient(policy, rollout)
        bench.note(way=way, **figures)
        results.append((logprobs, gradient))
        bench.note(layers_taken_apart=take_apart(policy.model))
    (logprobs, gradient), (expected, wanted) = results
    bench.note(logprobs=parts.apart(logprobs, expected))
    bench.within(ANOTHER_ORDER, relative_difference=((gradient - wanted).norm() / wanted.norm()).item())


def take_apart(model: nn.Module) -> int:
    """Gives layers with adapters PEFT's own forward again; how many there were."""
    fused = [m for m in model.modules() if getattr(vars(m).get("forward"), "func", None) is lora.adapted]
    for module in fused:
        del module.forward
    return len(fused)


def row(bench: Bench) -> None:
    """A row of the 1.5B model as r1_zero fills it on 40 GB: time, and its peak beside the plan's."""
    folder = bench.model("Qwen2.5-1.5B")
    config = parts.options(folder, bench.device, **bench.sizes(num_generations=8))
    plan = GRPOTrainer.plan_of(config)
    longest = config.max_prompt_length + config.max_completion_length
    lengths = [longest] + [plan.tokens - longest] * (plan.tokens - longest > 16)
    bench.note(lengths=lengths, recompute=plan.recompute, plan=plan.table())
    step, model = parts.one_row(config, lengths, plan)
    peaks = []
    for way in ("ours", "PEFT's adapters"):
        seconds, peak = parts.timed(step, bench.device)
        bench.note(
            way=way, seconds=seconds, tokens_per_s=sum(lengths) / seconds, peak_gib=peak, planned_gib=alone(plan)
        )
        peaks.append(peak)
        take_apart(model)
    speed_up(model)
    bench.step = step
    if peaks[0] is not None:
        bench.within(alone(plan), peak_gib=peaks[0])


def alone(plan: Plan) -> float:
    """GiB that the plan counts on in an update, without the engine's and CUDA's own."""
    others = ("engine", "engine's graphs", "KV cache", "CUDA", "kept back")
    return sum(size for name, size in plan.rows("update").items() if name not in others) / GIB


def kernels(bench: Bench) -> None:
    """The kernels of that row, those first that take longest."""
    if bench.step is None:
        raise RuntimeError("the row did not pass")
    cuda = bench.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        bench.step()
    spent = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key) for e in seen.key_averages()]
    bench.note(all_ms=sum(microseconds for microseconds, _, _ in spent) / 1e3)
    for microseconds, calls, name in sorted(spent, reverse=True)[:KERNELS]:
        bench.note(kernel=name[:120], ms=microseconds / 1e3, calls=calls)


CHECKS = [
    Check(probe, 20),
    Check(attention, 10),
    Check(residency, 15),
    Check(gradients, 20),
    Check(adapters, 15),
    Check(row, 60),
    Check(kernels, 10),
]
