"""The CUDA path on a machine without a card: which kernels run, what moves, what waits, and the CPU's gradients."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch

from nanorlhf.types import MicroBatch
from tests.cuda_on_cpu.card import ROOT
from tests.cuda_on_cpu.cases import CASES, OTHERS, PLANTED
from tests.models import HYBRID, SERVED

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the stub is built as on Linux"),
    pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="this torch has CUDA"),
]
READ = "_local_scalar_dense"  # what `item()` comes to
WAITS = {  # of three rows, measured by the reference and learned from
    f"logprobs.backbone_hidden: {READ}": 6,  # transformers asks whether the row is packed, for each kind of mask
    "learner.Learner.measure: copy to main memory": 3,  # what was measured
    f"metrics.Averages.add: {READ}": 12,  # entropy, clip_fraction, kl, mismatch
    f"metrics.Averages.peak: {READ}": 3,  # mismatch
    f"learner.PolicyLearner.backward: {READ}": 3,  # the loss
    f"optimizer.Optimizer.step_together: {READ}": 1,  # the gradient's norm
}
EXACT = {
    "mistral": WAITS,
    "qwen2": WAITS | {f"logprobs.backbone_hidden: {READ}": 12},  # masks with a window and without
    "deep, parked": WAITS,
    "ppo": {
        f"logprobs.backbone_hidden: {READ}": 30,  # measured thrice, learned from twice
        "learner.Learner.measure: copy to main memory": 12,  # log-probabilities, entropy, the reference's, values
        f"metrics.Averages.add: {READ}": 15,  # entropy, clip_fraction, mismatch, the critic's loss and mean
        f"metrics.Averages.peak: {READ}": 3,
        f"learner.PolicyLearner.backward: {READ}": 3,
        f"critic.Critic.backward: {READ}": 3,
        f"optimizer.Optimizer.step_together: {READ}": 2,
    },
}
ELSEWHERE = {"losses.by_sequence: _unique2", "losses.preference: _unique2"}
COPIES = {
    "types.MicroBatch.to: to the card",
    "segments.Segments.to: to the card",
    "attention.seen_by: to the card",
    "learner.Learner.measure: to main memory",
}
WIDE = {"critic.Critic.evaluate: float32", "backward: float32"}  # the critic's head, and recurrent layers


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of every case, all of them run by one process that has the card."""
    assert COMPILER is not None and request.config.cache is not None
    stub, out = request.config.cache.mkdir("cuda_on_cpu"), tmp_path_factory.mktemp("cuda_on_cpu") / "results.json"
    command = [sys.executable, "-m", "tests.cuda_on_cpu.cases", COMPILER, str(stub), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(out.read_text())


def complaints(name: str, seen: dict[str, Any]) -> list[str]:
    """The faults of a step on the card."""
    if seen["error"]:
        return [seen["error"].strip().splitlines()[-1]]
    case, waits = CASES[name], seen["waits"]
    full = case.options.get("dtype") == "float32"
    rows = seen["kernels"]["embedding"]
    learned = waits[f"learner.PolicyLearner.backward: {READ}"] + waits.get(f"critic.Critic.backward: {READ}", 0)
    again = learned if "gradient_checkpointing" in case.options else 0
    layers = 1 if name in HYBRID else case.layers
    if full or name.endswith(("gemma2", "gpt_oss")):  # 32 bits, capped scores and sinks are not for the kernel
        layers = 0
    wanted = {"_varlen_attn": layers * (rows + again), "_varlen_attn_backward": layers * learned}
    found = {k: seen["kernels"].get(k, 0) for k in ("_varlen_attn", "_varlen_attn_backward", "_fused_adamw_")}
    wide = {k for k in seen["products"] if not k.endswith("float32" if full else "bfloat16")}
    odd = {
        "kernels": found != wanted | {"_fused_adamw_": len(seen["apart"])},
        "waits": waits != EXACT[name] if name in EXACT else bool(waits.keys() - EXACT["ppo"].keys() - ELSEWHERE),
        "copies": any(k not in COPIES and not k.startswith("recomputation.Parked") for k in seen["copies"]),
        "mixed": bool(seen["mixed"]),
        "float64": seen["float64"].keys() != {"metrics.Averages.add"},
        "products": bool(wide - (WIDE if case.algorithm == "ppo" or name in HYBRID else set())),
        "apart": max(seen["apart"]) > (1e-5 if full else 0.1),
    }
    return [f"{kind}: {found if kind == 'kernels' else seen[kind]}" for kind, wrong in odd.items() if wrong]


@pytest.mark.parametrize("name", CASES)
def test_a_step_runs_on_a_card_as_on_the_cpu(name: str, results: dict[str, Any]) -> None:
    assert complaints(name, results[name]) == []


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, (_, word) in PLANTED.items()], ids=PLANTED)
def test_a_planted_mistake_is_found(name: str, word: str, results: dict[str, Any]) -> None:
    assert any(word in said for said in complaints("mistral", results[name]))


@pytest.mark.parametrize("name", [*SERVED, *HYBRID])
def test_a_model_is_verified_on_a_card(name: str, results: dict[str, Any]) -> None:
    assert results[f"verify {name}"]["error"] is None


def test_a_batch_travels_once_and_comes_back_as_figures(results: dict[str, Any]) -> None:
    assert results["qwen2"]["copies"] == {
        "types.MicroBatch.to: to the card": 6 * len(fields(MicroBatch)),  # of which one is two or three columns
        "segments.Segments.to: to the card": 6 * 2,
        "learner.Learner.measure: to main memory": 3,
    }


def test_layers_inputs_leave_and_return(results: dict[str, Any]) -> None:
    plain, again, parked = results["deep"], results["deep, recomputed"], results["deep, parked"]
    moved = {k.partition(": ")[2]: n for k, n in parked["copies"].items() if k.startswith("recomputation.Parked")}
    assert moved == {"to main memory": 5 * 3, "to the card": 3 * 3}  # of a row's five layers the last two are held
    assert plain["apart"] == again["apart"] == parked["apart"]  # to the last bit
    assert parked["peak"] < again["peak"] < 0.6 * plain["peak"]


def test_heads_may_be_repeated(results: dict[str, Any]) -> None:
    assert complaints("mistral", results["heads repeated"]) == []


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("moving")])
def test_a_run_is_the_same_when_everybody_moves(name: str, results: dict[str, Any]) -> None:
    assert results[name]["error"] is None and results[name]["misplaced"] == []
    assert len(results[name]["still"]) >= 3 and results[name]["moving"] == results[name]["still"]
    assert len(results[name]["fused"]) >= 2 and all(results[name]["fused"])


def test_a_row_that_does_not_fit_costs_nothing(results: dict[str, Any]) -> None:
    seen = results["memory runs out"]
    assert seen["error"] is None and seen["fits"] < seen["peak"] < seen["does not"]
    assert len(seen["warnings"]) == 1 and "out of memory (update), nothing is lost" in seen["warnings"][0]
    assert seen["apart"][0] < 1e-5


def test_a_rehearsal_lowers_the_budget_and_leaves_nothing(results: dict[str, Any]) -> None:
    seen = results["rehearsed"]
    assert seen["error"] is None and seen["same"] and seen["left"] == 0
    assert seen["told"][0] == [] and "out of memory (rehearsal)" in seen["told"][1][0]
    assert seen["tokens"] == [480, 240]
    assert seen["at_once"] == 0  # on a card every answer gathers its prompt's keys


def test_a_layer_costs_less_as_one_function(results: dict[str, Any]) -> None:
    fused, peft = results["a layer"]["one function"], results["a layer"]["PEFT"]
    assert 100 < fused["kernels"] < peft["kernels"]
    assert fused["elementwise_bytes"] < 0.7 * peft["elementwise_bytes"]
    assert fused["bytes_kept"] < 0.95 * peft["bytes_kept"]
