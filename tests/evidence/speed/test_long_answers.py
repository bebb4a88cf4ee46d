"""Measurements of long answers: what is made of the figures, and each for real at its tiny size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from statistics import fmean

import pytest

from evidence.learning import partial_rollouts
from evidence.speed import lengths


def test_the_line_goes_through_the_shortest_and_the_longest() -> None:
    assert lengths.beside_the_line([1, 2, 4], [11.0, 12.0, 14.0]) == 0
    assert lengths.beside_the_line([1, 2, 4], [1.0, 4.0, 16.0]) == pytest.approx((1 + 5 - 4) / 16)


def test_lengths_have_a_tail_and_a_mean_of_a_sixth_of_the_longest() -> None:
    drawn = [partial_rollouts.length_of(prompt, number, 384) for prompt in range(400) for number in range(8)]
    assert max(drawn) == 384 and fmean(drawn) == pytest.approx(384 / 6, rel=0.1)
    assert drawn[5] == partial_rollouts.length_of(0, 5, 384)


def test_the_reward_is_the_share_of_good_words() -> None:
    assert partial_rollouts.earning([True, False, True])([[0, 2, 1, 0], [1]]) == [0.75, 0.0]


@pytest.mark.slow
@pytest.mark.evidence
def test_partial_rollouts(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    words = ["--size", "tiny", "--engine", "hf", "--seeds", "2", "--output", str(output)]
    assert partial_rollouts.main(words) == 0
    found = json.loads(output.read_text())
    assert found["speedup"] > 0 and {len(runs) for runs in found["runs"].values()} == {2}
    assert all(run["carried"] > 0 and run["oldest"] <= 4 for run in found["runs"]["partial"])
    assert all(len(run["held_out"]) == 5 and 0 < run["mean_over_longest"] < 0.5 for run in found["runs"]["waiting"])


@pytest.mark.slow
@pytest.mark.evidence
def test_lengths(tmp_path: Path) -> None:
    lengths.main(["--size", "tiny", "--repeats", "1", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["tokens"] for row in found["rows"]] == [16, 64]
    assert all(row["update_seconds"] > 0 and row["rollout_seconds"] > 0 for row in found["rows"])


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_decode_step(tmp_path: Path) -> None:
    from evidence.speed import decode_step

    decode_step.main(["--size", "tiny", "--repeats", "2", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    was, now = (found["rows"][name] for name in decode_step.WAYS)
    assert was["tokens"] == now["tokens"] and was["steps"] == now["steps"] > 0
    assert now["ours_us_a_step"] < was["ours_us_a_step"] and found["vllm"]
