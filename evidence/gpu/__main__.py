"""Everything that only a GPU can show, part by part: `python -m evidence.gpu`; docs/gpu.md says what each part means.

parity:  log-probabilities of engine and trainer, packed and one by one; gradients with recomputation and offloading
trainer: tokens a second and peak memory of forward, backward and optimizer step alone
steps:   whole steps held to 40 GB, completions of drawn lengths
trl:     the same steps by TRL's GRPOTrainer with colocated vLLM, and by ours, completions of one length
head:    our LM head against liger-kernel's fused one

Every case has a process of its own; what fails is noted and the next one runs. `--device cpu --tiny` tries it out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evidence.gpu import parts, shapes
from evidence.results import write
from evidence.speed.benchmark import about

CASE = "import sys; from evidence.gpu.__main__ import run_case; run_case(*sys.argv[1:])"


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement; `published` are public figures of others for the same shape, if there are any."""

    part: str
    shape: str
    options: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join([self.shape, *(f"{k} {v}" for k, v in self.options.items())])


CASES = [
    Case("parity", "Qwen3-0.6B", {"samples": 64, "tokens": 512}),
    Case("parity", "Qwen2.5-1.5B", {"samples": 32, "tokens": 2048}),
    Case("trainer", "Qwen3-0.6B", {"tokens": 16384}, {"tokens_per_s": 13300, "peak_gib": 5.1}),
    Case("trainer", "Qwen3-4B", {"tokens": 16384}, {"tokens_per_s": 6230, "peak_gib": 23.3}),
    Case("trainer", "Qwen3-4B", {"tokens": 65536}, {"tokens_per_s": 4160, "peak_gib": [31, 42]}),
    Case("trainer", "Qwen3-4B", {"tokens": 65536, "offload": "off"}, {"tokens_per_s": 4160, "peak_gib": [31, 42]}),
    Case("steps", "Qwen2.5-1.5B", {"length": 8000, "gigabytes": 40}),
    Case("steps", "Qwen2.5-1.5B", {"length": 8000, "gigabytes": 40, "partial_rollouts": 0.5}),
    Case("steps", "Qwen2.5-7B", {"length": 16000, "gigabytes": 40}),
    Case("trl", "Qwen2.5-1.5B", {"length": 2048, "side": "ours"}),
    Case("trl", "Qwen2.5-1.5B", {"length": 2048, "side": "trl"}),
    Case("trl", "Qwen2.5-1.5B", {"length": 8000, "side": "ours"}),
    Case("trl", "Qwen2.5-1.5B", {"length": 8000, "side": "trl"}),
    Case("head", "Qwen3-4B", {"tokens": 8192}),
    Case("head", "Qwen2.5-7B", {"tokens": 8192}),
]
MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "parity": parts.parity,
    "trainer": parts.trainer_alone,
    "steps": parts.steps,
    "trl": parts.versus_trl,
    "head": parts.head,
}


def run_case(folder: str, case: str, device: str, tiny: str, model: str) -> None:
    """Measures a case in a process of its own, and writes its figures into `folder`."""
    figures = measured(Path(folder), Case(**json.loads(case)), device, tiny == "True", model)
    (Path(folder) / "figures.json").write_text(json.dumps(figures))


def measured(folder: Path, case: Case, device: str, tiny: bool, model: str = "") -> dict[str, Any]:
    """The case's figures, with the folder `model` or one made for it."""
    if model:
        (folder / "model").symlink_to(Path(model).resolve(strict=True))
    else:
        shapes.write(folder / "model", case.shape, device, tiny)
    return MEASURES[case.part](folder, device=device, tiny=tiny, **case.options)


def in_a_process(case: Case, device: str, tiny: bool, model: str) -> dict[str, Any]:
    """The case's figures, or the last thing that was said before it failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CASE, folder, json.dumps(asdict(case)), device, str(tiny), model]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            said = ended.stderr.strip().splitlines() or [""]
            return {"failed": f"exit {ended.returncode}: {said[-1]}"}
        return json.loads((Path(folder) / "figures.json").read_text())


def card(device: str) -> dict[str, Any]:
    """The card that it was measured on."""
    import torch

    if device == "cpu":
        return {"card": "none: only a trial on a CPU"}
    named = torch.cuda.get_device_properties(0)
    versions = {"cuda": torch.version.cuda, "capability": f"{named.major}.{named.minor}"}
    return {"card": named.name, "memory_gib": named.total_memory / 2**30, **versions}


def ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """TRL's seconds over ours, for every length that both have."""
    seconds = {
        (r["shape"], r["options"]["length"], r["options"]["side"]): r["figures"]["seconds_per_step"]
        for r in runs
        if "side" in r["options"] and "failed" not in r["figures"]
    }
    both = [(s, n) for s, n, side in seconds if side == "ours" and (s, n, "trl") in seconds]
    return {f"{s}, length {n}": seconds[s, n, "trl"] / seconds[s, n, "ours"] for s, n in both}


def main(argv: list[str] | None = None) -> int:
    """Measures and writes results/gpu_<part>.json after every case; 1 if a case failed."""
    parser = argparse.ArgumentParser(
        prog="python -m evidence.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=MEASURES, nargs="+", default=list(MEASURES), help="Parts (default: all).")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for --tiny.")
    parser.add_argument("--tiny", action="store_true", help="Shapes of a few thousand weights, rows of a few tokens.")
    parser.add_argument("--model", default="", help="A folder with real weights, instead of each shape's random ones.")
    parser.add_argument("--output", type=Path, default=Path("results"), help="Folder (default: results).")
    options = parser.parse_args(argv)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "evidence.gpu: error: there is no CUDA device here; --device cpu --tiny only tries it out", file=sys.stderr
        )
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in options.only:
        report = (
            {"part": part, "tiny": options.tiny, "model": options.model or "random weights"}
            | card(options.device)
            | about(torch.get_num_threads())
        )
        runs: list[dict[str, Any]] = []
        for case in (c for c in CASES if c.part == part):
            figures = in_a_process(case, options.device, options.tiny, options.model)
            runs.append({"shape": case.shape, "options": case.options, "published": case.published, "figures": figures})
            report |= {"trl_over_ours": ratios(runs)} if part == "trl" else {}
            path = options.output / f"gpu_{part}.json"
            write(path, report | {"runs": runs})
            print(f"{part}: {case.name}: {json.dumps(figures)}", flush=True)
            failed |= "failed" in figures
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
