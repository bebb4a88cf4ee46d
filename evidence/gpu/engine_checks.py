"""Checks on a card with vLLM beside the trainer, in one process; run 2 of evidence/gpu/first.py."""

from __future__ import annotations

import contextlib
import cProfile
import gc
import pstats
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from evidence.gpu import parts
from evidence.gpu.bench import Bench, Check, in_gib
from nanorlhf import assembly
from nanorlhf.engines.base import MISMATCH_LIMIT, Request, Sampling
from nanorlhf.engines.launch import free_share
from nanorlhf.engines.vllm import VLLMEngine
from nanorlhf.grpo import GRPOConfig, GRPOTrainer
from nanorlhf.ppo import PPOConfig, PPOTrainer
from nanorlhf.system.device import taken

FUNCTIONS = 40  # of the host's time
METRICS = ("step", "memory", "time", "throughput", "mismatch", "loss", "grad_norm", "tokens", "completion", "value")


def start(bench: Bench) -> None:
    """A trainer with its engine: seconds and memory, before and after graphs, beside the plan's."""
    begun = time.perf_counter()
    made = options(bench, "grpo")
    bench.note(model_seconds=time.perf_counter() - begun, **card(bench))
    begun = time.perf_counter()
    with graphs_noted(bench):
        bench.trainer = GRPOTrainer(**parts.ingredients(bench.tiny), args=GRPOConfig(**made))
    bench.note(seconds=time.perf_counter() - begun, **card(bench))
    if plan := bench.trainer.plan:
        bench.note(plan=plan.table(), **in_gib(planned=plan.total("generate")))


def options(bench: Bench, name: str, **others: Any) -> dict[str, Any]:
    """Those of both trainers: r1_zero's, two steps, an engine that says what it does."""
    run = {"output_dir": str(bench.folder / name), "max_steps": 2, "eval_steps": 0, "save_steps": 0}
    run |= {"num_generations": 8}  # PPO too, so that its plan has no less cache than the engine that it is lent
    run |= {"keep_rollouts": False, "engine": "vllm", "engine_logs": True, "weight_sync": "lora"}
    model = {"model_name_or_path": str(bench.model("Qwen2.5-1.5B") / "model"), "device": bench.device}
    return bench.sizes(**run, **model, **others)


def card(bench: Bench) -> dict[str, float]:
    """The memory of the card that is taken by now, and the part that torch's allocator has."""
    if bench.device == "cpu":
        return {}
    torch.cuda.synchronize()
    return in_gib(taken=taken(torch.device("cuda")), torchs=torch.cuda.memory_reserved())


@contextlib.contextmanager
def graphs_noted(bench: Bench) -> Iterator[None]:
    """Notes what is taken before the first CUDA graph is captured and after the last, and the seconds of all."""
    kind: Any = torch.cuda.CUDAGraph
    begin, end = kind.capture_begin, kind.capture_end
    stamps: list[float] = []

    def begun(graph: Any, *args: Any, **kwargs: Any) -> None:
        if not stamps:
            stamps.append(time.perf_counter())
            bench.note(graphs="to come", **card(bench))
        begin(graph, *args, **kwargs)

    def ended(graph: Any) -> None:
        end(graph)
        stamps.append(time.perf_counter())

    kind.capture_begin, kind.capture_end = begun, ended
    try:
        yield
    finally:
        kind.capture_begin, kind.capture_end = begin, end
    if stamps:
        bench.note(graphs=len(stamps) - 1, seconds=stamps[-1] - stamps[0])


def engine_of(bench: Bench) -> Any:
    """vLLM itself, awake, with everybody on the card."""
    if bench.trainer is None:
        raise RuntimeError("the engine did not start")
    bench.trainer.serve()
    bench.trainer.residency.prepare(frozenset(bench.trainer.residency.units))
    return bench.trainer.engine.engine


def asked(bench: Bench, count: int, tokens: int) -> list[Request]:
    return parts.requests(4, 8, longest=8) if bench.tiny else parts.requests(count, tokens)


def endless(asked: Sequence[Request]) -> Sampling:
    """At temperature 1, with nothing that ends a completion but its limit."""
    return Sampling(1.0, max(r.max_tokens or 1 for r in asked), ())


def tokens(engine: Any, asked: Sequence[Request], seed: int) -> list[list[int]]:
    """The tokens that are written, in the order asked for, with nothing remembered of earlier prompts."""
    engine.forget()
    return [c.token_ids for c in sorted(engine.generate(asked, seed, endless(asked)), key=lambda c: c.id)]


def unlike(one: Sequence[list[int]], other: Sequence[list[int]]) -> float:
    """The share of completions that differ."""
    return sum(a != b for a, b in zip(one, other, strict=True)) / len(one)


def speed(bench: Bench) -> None:
    """256 completions of 512 tokens at once, with the adapter and without."""
    engine, count, length = engine_of(bench), 4 if bench.tiny else 256, 8 if bench.tiny else 512
    requests = [Request(i, [2 + i % 400] * 16, max_tokens=length) for i in range(count)]
    adapter = engine.lora_request
    for way, request in (("warm", adapter), ("with adapter", adapter), ("without", None)):
        engine.lora_request = request
        wall, cpu = time.perf_counter(), time.process_time()
        written = sum(map(len, tokens(engine, requests, seed=1)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        step = {"step_ms": 1e3 * wall / length, "cpu_ms": 1e3 * cpu / length}
        bench.note(way=way, tokens_per_s=written / wall, **step, **card(bench))
    engine.lora_request = adapter


def host(bench: Bench) -> None:
    """Python's time while 256 completions decode: milliseconds a step, with all that is called there."""
    engine, count, length = engine_of(bench), 4 if bench.tiny else 256, 8 if bench.tiny else 128
    requests = [Request(i, [2 + i % 400] * 16, max_tokens=length) for i in range(count)]
    seen = cProfile.Profile()
    seen.runcall(tokens, engine, requests, 1)
    rows: list[tuple[float, float, int, str]] = [
        (total, own, calls, f"{'/'.join(file.split('/')[-3:])}:{line} {name}")
        for (file, line, name), (_, calls, own, total, _) in pstats.Stats(seen).stats.items()  # type: ignore[attr-defined]
    ]
    for total, own, calls, name in sorted(rows, reverse=True)[:FUNCTIONS]:
        bench.note(function=name, ms=1e3 * total / length, own_ms=1e3 * own / length, calls=calls / length)


def mismatch(bench: Bench) -> None:
    """Log-probabilities of engine and trainer, the engine's head rounded to 16 bits and in float32."""
    engine = engine_of(bench)
    before = engine.engine.collective_rpc(heads)[0]
    for dtype in (torch.bfloat16, torch.float32):
        engine.engine.collective_rpc(turn_heads, args=([dtype] * len(before),))
        bench.note(head=str(dtype), before=str(before[0]), **gap(bench, engine))
    engine.engine.collective_rpc(turn_heads, args=(before,))
    close(bench, engine)


def processors(worker: Any) -> list[Any]:
    """Runs inside vLLM: the parts that make logits of hidden states, each of which looks at its type every time."""
    return [m for m in worker.get_model().modules() if hasattr(m, "head_dtype")]


def heads(worker: Any) -> list[torch.dtype | None]:
    """Runs inside vLLM: the types they have."""
    return [m.head_dtype for m in processors(worker)]


def turn_heads(worker: Any, dtypes: Sequence[torch.dtype | None]) -> None:
    """Runs inside vLLM: gives them others."""
    for module, dtype in zip(processors(worker), dtypes, strict=True):
        module.head_dtype = dtype


def gap(bench: Bench, engine: Any) -> dict[str, float]:
    """The distance of engine and trainer about what the engine writes."""
    requests = asked(bench, 64, 512)
    rollout = parts.as_written(requests, engine.generate(requests, 7, endless(requests)))
    trained = parts.everything(bench.trainer.policy, rollout, parts.ROW)
    return parts.apart(rollout.columns["engine_logprobs"], trained)


def close(bench: Bench, engine: Any, **about: Any) -> None:
    """They must be as close as a run asks for."""
    bench.within(MISMATCH_LIMIT[bench.trainer.policy.compute_dtype], **gap(bench, engine), **about)


def seeds(bench: Bench) -> None:
    """The same seed writes the same, another one something else."""
    engine, requests = engine_of(bench), asked(bench, 128, 256)
    first, again, other = (tokens(engine, requests, seed) for seed in (1, 1, 2))
    bench.within(0, changed=unlike(first, again))
    bench.within(0.5, unchanged_by_another_seed=1 - unlike(first, other))


def sleep(bench: Bench) -> None:
    """Sleep gives memory back, and what wakes up writes the same."""
    engine, requests = engine_of(bench), asked(bench, 64, 128)
    first = tokens(engine, requests, seed=3)
    away(bench, engine)
    bench.within(0, changed=unlike(first, tokens(engine, requests, seed=3)))
    close(bench, engine)


def away(bench: Bench, engine: Any) -> None:
    """The engine goes to sleep, wakes up and takes its weights."""
    steps = {"awake": lambda: None, "asleep": engine.sleep, "awake again": engine.wake}
    steps["up to date"] = lambda: engine.update(bench.trainer.policy)
    for state, work in steps.items():
        start = time.perf_counter()
        work()
        bench.note(state=state, **card(bench), seconds=time.perf_counter() - start)


def adapter(bench: Bench) -> None:
    """A new adapter is what the engine serves from then on, graphs or not."""
    engine, requests, policy = engine_of(bench), asked(bench, 64, 128), bench.trainer.policy
    before = parts.as_written(requests, engine.generate(requests, 5, endless(requests)))
    parts.disturb_adapter(policy)
    policy.version += 1
    start = time.perf_counter()
    engine.update(policy)
    bench.note(update_seconds=time.perf_counter() - start)
    moved = parts.everything(policy, before, parts.ROW)
    bench.note(moved=parts.apart(before.columns["engine_logprobs"], moved))
    close(bench, engine)


def grpo(bench: Bench) -> None:
    """Two whole steps of GRPO, each phase's peak beside the plan's."""
    engine_of(bench)
    steps(bench)


def steps(bench: Bench) -> None:
    """Trains to the end, completions of drawn lengths; no phase may take more than was planned."""
    parts.drawn(bench.trainer.sampler, 8 if bench.tiny else 1000)
    over = 0.0
    for metrics in bench.trainer.steps():
        figures = {n: v for n, v in metrics.items() if n.split("/")[0] in METRICS and v is not None}
        bench.note(**figures, **card(bench))
        peaks = [n.removesuffix("peak_gib") for n in metrics if n.count("/") == 2 and n.endswith("/peak_gib")]
        over = max([over, *(metrics[f"{n}peak_gib"] - metrics[f"{n}planned_gib"] for n in peaks)])
    bench.within(0, gib_over_the_plan=over)


def ppo(bench: Bench) -> None:
    """Two steps of PPO in which everybody moves, the critic too, with the engine that is there."""
    engine = engine_of(bench)
    bench.trainer.scorer.close()
    bench.trainer = None
    gc.collect()
    config = PPOConfig(**options(bench, "ppo", offload="always", value_init_prompts=0))
    with lent(engine):
        bench.trainer = PPOTrainer(**parts.ingredients(bench.tiny), args=config)
    if plan := bench.trainer.plan:
        bench.note(plan=plan.table())
    steps(bench)


@contextlib.contextmanager
def lent(engine: Any) -> Iterator[None]:
    """A trainer that is made meanwhile takes this engine instead of starting one, which would cost a minute."""
    start, engine.version = assembly.build_engine, -1
    assembly.build_engine = lambda *_: engine
    try:
        yield
    finally:
        assembly.build_engine = start


def merged(bench: Bench) -> None:
    """Another engine in the same process, of merged weights, which drops them in its sleep."""
    engine_of(bench)
    bench.trainer.engine.close()
    gc.collect()
    bench.note(closed=True, **card(bench))
    policy, config = bench.trainer.policy, bench.trainer.config
    longest = config.max_prompt_length + config.max_completion_length
    cache = bench.trainer.plan.cache if bench.trainer.plan else None
    start, dtype = time.perf_counter(), str(policy.compute_dtype).removeprefix("torch.")
    engine = VLLMEngine(
        config.model_name_or_path, Sampling(1.0, 8, ()), sync="merged", dtype=dtype, max_model_len=longest,
        gpu_memory_utilization=free_share(), kv_cache_bytes=cache, sleep=True, verbose=True, enforce_eager=True,
    )  # fmt: skip
    with contextlib.closing(engine):
        engine.update(policy)
        bench.note(seconds=time.perf_counter() - start, **card(bench))
        requests = asked(bench, 64, 128)
        first = tokens(engine, requests, seed=3)
        away(bench, engine)
        bench.within(0, changed=unlike(first, tokens(engine, requests, seed=3)))
        close(bench, engine)


CHECKS = [
    Check(start, 120),
    Check(speed, 20),
    Check(mismatch, 20),
    Check(adapter, 10),
    Check(seeds, 10),
    Check(sleep, 15),
    Check(grpo, 60),
    Check(host, 10),
    Check(ppo, 60),
    Check(merged, 30),
]
