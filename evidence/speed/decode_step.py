"""Python of ours in a decode step of vLLM, as it was and as it is, in one run: `python -m evidence.speed.decode_step`.

256 answers with a tail of lengths, in this process. Whatever is not inside of vLLM's own calls is ours. As it was, the
state of random numbers was kept around each step, and each request had settings of its own that vLLM copied part by
part; both ways take turns. The profile says where vLLM's own time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import pstats
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from evidence.results import RESULTS, where, write
from evidence.speed.workloads import aligned
from nanorlhf.config.names import shipped_model
from nanorlhf.engines.base import Completion, Request, Sampling
from nanorlhf.engines.side_effects import kept_random_state
from nanorlhf.engines.vllm import VLLMEngine
from nanorlhf.engines.vllm_outputs import completion
from nanorlhf.records.console import ProgressBar
from nanorlhf.system.seeds import derive

SIZES = {"full": (256, 400), "tiny": (8, 12)}  # sequences, and tokens of the longest
INSIDE = ("step", "add_request", "abort_request")
PROFILED = 15  # functions of vLLM's that are named
CALLS = 200  # of what an answer costs outside of the engine
Way = Callable[[VLLMEngine, Sequence[Request], int, Sampling], Iterator[Completion]]


class Inside:
    """Seconds that this thread computes within vLLM's own calls, a name each."""

    def __init__(self, engine: Any) -> None:
        self.clear()
        for name in INSIDE:
            setattr(engine, name, self.timed(name, getattr(engine, name)))

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **options: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self.seconds[name] += time.thread_time() - start
                self.calls[name] += 1

        return measured

    def clear(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(INSIDE, 0.0)
        self.calls: dict[str, int] = dict.fromkeys(INSIDE, 0)


def as_it_was(engine: VLLMEngine, requests: Sequence[Request], seed: int, sampling: Sampling) -> Iterator[Completion]:
    """The loop before it was made shorter."""
    with kept_random_state(engine.devices):
        for request in requests:
            settings = engine.settings(sampling, request.greedy)
            settings.seed, settings.max_tokens = derive(seed, request.id), sampling.limit(request)
            settings.skip_clone = False
            prompt = {"prompt_token_ids": request.prompt_ids}
            engine.engine.add_request(str(request.id), prompt, settings, lora_request=engine.lora_request)
    while engine.engine.has_unfinished_requests():
        with kept_random_state(engine.devices):
            outputs = engine.engine.step()
        for output in outputs:
            yield completion(output)


def as_it_is(engine: VLLMEngine, requests: Sequence[Request], seed: int, sampling: Sampling) -> Iterator[Completion]:
    return engine.generate(requests, seed, sampling)


WAYS: dict[str, Way] = {"as it was": as_it_was, "as it is": as_it_is}


def asked(sequences: int, longest: int) -> list[Request]:
    """Requests that end at lengths of their own, the mean about a third of the longest."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder"))
    draw = random.Random(0)
    lengths = [min(longest, max(1, round(longest / 4 * math.exp(draw.gauss(0, 0.8))))) for _ in range(sequences)]
    return [Request(i, tokenizer(f"{i // 8}+{i // 8}=")["input_ids"], max_tokens=n) for i, n in enumerate(lengths)]


def measured(engine: VLLMEngine, inside: Inside, way: Way, requests: Sequence[Request], stop: tuple[str, ...]) -> Any:
    """Microseconds of one rollout: of ours a step and a request, of vLLM's a step and a request."""
    engine.forget()
    inside.clear()
    start = time.thread_time()
    written = list(way(engine, requests, 1, Sampling(1.0, 4096, (), stop)))
    whole, steps = time.thread_time() - start, inside.calls["step"]
    vllm = sum(inside.seconds.values())
    return {
        "steps": steps,
        "tokens": sum(len(c.token_ids) for c in written),
        "ours_us_a_step": 1e6 * (whole - vllm) / steps,
        "vllm_us_a_step": 1e6 * inside.seconds["step"] / steps,
        "vllm_us_a_request_added": 1e6 * inside.seconds["add_request"] / len(requests),
    }


def named(engine: VLLMEngine, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """The functions in which a rollout spends most time of their own, under a profiler."""
    profiler = cProfile.Profile()
    profiler.runcall(lambda: list(as_it_is(engine, requests, 2, Sampling(1.0, 4096, ()))))
    stats: Any = pstats.Stats(profiler)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:PROFILED]
    whole = sum(row[2] for row in stats.stats.values())
    return [
        {"function": f"{Path(file).name}:{name}", "calls": calls, "share": own / whole}
        for (file, _, name), (_, calls, own, *_) in rows
    ]


def beside(tokens: list[int]) -> dict[str, float]:
    """Microseconds that a finished answer costs outside of the engine: its text, and the progress bar."""
    tokenizer, bar = AutoTokenizer.from_pretrained(shipped_model("nanorlhf:adder")), ProgressBar(1, 0)
    calls: dict[str, Callable[[], object]] = {
        "text": lambda: tokenizer.decode(tokens, skip_special_tokens=True),
        "progress": lambda: bar.writing(len(tokens)),
    }
    found = {}
    for name, call in calls.items():
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        found[f"{name}_us_an_answer"] = 1e6 * (time.thread_time() - start) / CALLS
    bar.close()
    return found


def main(argv: list[str] | None = None) -> int:
    """Measures, writes results/decode_step.json, prints a table; gives 1 if ours is more than half of what it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny only shows that it works")
    parser.add_argument("--repeats", type=int, default=5, help="of each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "decode_step.json", help="default: %(default)s")
    options = parser.parse_args(argv)
    requests = asked(*SIZES[options.size])
    never_said = ("\u2603",)  # a stop string that nobody writes: vLLM then turns every token into text
    engine = VLLMEngine(
        shipped_model("nanorlhf:adder"), Sampling(1.0, 4096, (), never_said), sync="merged", max_model_len=512
    )
    try:
        inside, runs = Inside(engine.engine), dict[str, list[dict[str, Any]]]()
        for number in range(options.repeats + 1):
            for name, way in WAYS.items():
                for stop, words in (((), ""), (never_said, ", with a stop string")):
                    run = measured(engine, inside, way, requests, stop)
                    if number:  # the first warms up
                        runs.setdefault(name + words, []).append(run)
        profile = named(engine, requests)
    finally:
        engine.close()
    rows = {name: {key: median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}
    ratio = rows["as it is"]["ours_us_a_step"] / rows["as it was"]["ours_us_a_step"]
    found = where() | {"sequences": len(requests), "rows": rows, "of_what_it_was": ratio, "vllm": profile}
    found |= {"beside": beside(list(range(40, 140)))}
    write(options.output, found)
    cells = [[name, *(f"{value:,.0f}" for value in row.values())] for name, row in rows.items()]
    print("\n".join(aligned([["", *rows["as it is"]], *cells], names=True)))
    print(f"ours is {ratio:.0%} of what it was; most of vLLM's: " + ", ".join(row["function"] for row in profile[:5]))
    return 0 if ratio <= 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
