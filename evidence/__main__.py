"""Measures what the README claims, and writes its tables; goes on where it was stopped.

Comparisons leave results/<claim>.json, every other measurement one of its own; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from evidence.results import RESULTS, ROOT
from evidence.speed.scaling import draw_sharing
from nanorlhf.scripts import compare
from nanorlhf.scripts.comparing.publish import read_runs, table_text, tables
from nanorlhf.scripts.comparing.verdicts import verdicts
from nanorlhf.scripts.reporting.page import Table

ALGORITHMS = ("grpo", "ppo", "rloo", "remax", "raft", "reinforce")
CLAIMS = {
    "algorithms": [*ALGORITHMS],
    "engines": ["grpo:engine=vllm", "grpo:engine=vllm,weight_sync=lora", "grpo:engine=hf"],
    "family": [f"grpo:{name}" for name in ("dapo", "dr_grpo", "gspo", "cispo", "sapo")],
}
SCRIPTS = {  # by the file that each leaves
    "value_init": "learning.value_init",
    "richness": "learning.richness",
    "gym": "learning.reasoning_gym",
    "overlap": "speed.slow_rewards",
    "step_times": "speed.step_times",
    "planted": "learning.planted_differences",
    "planted_bugs": "plant_bugs",
    "kills": "survival.kills",
    "soak": "survival.soak",
    "processes": "learning.several_processes",
    "benchmark_update": "speed.benchmark",
}
RIVALRY = {  # what each benchmark against TRL is about
    "update": "GRPO's update, skewed lengths",
    "even": "the same, all of one length",
    "outlier": "the same, one of 4,096 tokens among short ones",
    "rloo": "RLOO's update",
    "sft": "SFT's update",
    "dpo": "DPO's update",
    "step": "whole steps of GRPO, each with its engine",
    "smol": "SmolLM2-135M, GRPO's update, prompts of 90, answers of 9",
    "smol_long": "the same, prompts of 400, answers of 40",
    "smol_step": "SmolLM2-135M, whole steps of GRPO",
    "goal": "the shipped task, until .90",
    "refresh": "new weights for vLLM",
}
PICTURES = ("reward_by_time", "reward_by_samples", "phases")
START, END = "<!-- {}: made by make evidence -->", "<!-- end -->"


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, then writes the tables; gives 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*CLAIMS, *SCRIPTS], nargs="+", help="some claims instead of all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each comparison (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="only write the tables from what is there")
    args = parser.parse_args(argv)
    chosen = [] if args.tables else args.only or [*CLAIMS, *SCRIPTS]
    RESULTS.mkdir(exist_ok=True)
    failed = [claim for claim in chosen if not made(claim, args.seeds)]
    write_tables(ROOT / "README.md")
    if (sharing := RESULTS / "benchmark_sharing.json").exists():
        draw_sharing(json.loads(sharing.read_text()), ROOT / "docs" / "shared_prompts.png")
    return bool(failed)


def made(claim: str, seeds: int) -> bool:
    """Whether a claim's results are there, now or since earlier."""
    if (RESULTS / f"{claim}.json").exists():
        return True
    if claim in SCRIPTS:
        words = [sys.executable, "-m", f"evidence.{SCRIPTS[claim]}"]
        return subprocess.run(words, cwd=ROOT, check=False).returncode == 0
    folder = ROOT / "runs" / "evidence" / claim
    if compare.main([*CLAIMS[claim], "--seeds", str(seeds), "--output", str(folder)]):
        return False
    keep(claim, folder)
    return True


def keep(claim: str, folder: Path) -> None:
    """Keeps what the README, and the algorithms' pages, show of a comparison."""
    shutil.copy(folder / "comparison.json", RESULTS / f"{claim}.json")
    if claim == "algorithms":
        for name in PICTURES:
            shutil.copy(folder / f"{name}.png", ROOT / "docs" / f"{name}.png")
        for name in ALGORITHMS:
            shutil.copy(folder / "runs" / f"{name}-seed0" / "learning_curve.png", ROOT / name)


def write_tables(readme: Path) -> None:
    """Puts the tables of every comparison that there is between its marks in the README."""
    text = readme.read_text()
    for claim in CLAIMS:
        before, mark, rest = text.partition(START.format(claim))
        path = RESULTS / f"{claim}.json"
        if mark and path.exists():
            text = f"{before}{mark}\n{comparison_text(path)}\n{END}{rest.partition(END)[2]}"
    before, mark, rest = text.partition(START.format("rivalry"))
    readme.write_text(f"{before}{mark}\n{rivalry()}\n{END}{rest.partition(END)[2]}" if mark else text)


def comparison_text(path: Path) -> str:
    """A comparison in one table, and what exceeds the noise."""
    runs = read_runs(path)
    rewards, costs, _ = tables(runs)
    heads = ["", *rewards.heads[3:], *costs.heads[1:]]
    rows = [[reward[0], *reward[3:], *cost[1:]] for reward, cost in zip(rewards.rows, costs.rows, strict=True)]
    return f"{table_text(Table('', heads, rows))}\n\n{chr(10).join(f'- {line}' for line in verdicts(runs))}"


def rivalry() -> str:
    """Every benchmark against TRL that there is in one table: medians, and TRL's best in time and in memory."""
    heads = ["", "ours s", "MiB", "TRL's best s", "MiB", "time, ours 1", "memory, ours 1", "disagree by"]
    rows: list[list[str]] = []
    for name, words in RIVALRY.items():
        path = RESULTS / f"benchmark_{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        medians, best, agreed = found["medians"], found["trl_best"], found["agreement"].values()
        sides = [medians["ours"]["seconds"], medians["ours"]["above_start_mib"]]
        sides += [medians[best[figure]][figure] for figure in ("seconds", "above_start_mib")]
        cells = [f"{side:,.0f}" if side >= 100 else f"{side:.2g}" for side in sides]
        ratios = [f"{found['trl_over_ours'][figure]:.1f}" for figure in ("seconds", "above_start_mib")]
        rows.append([words, *cells, *ratios, f"{max(agreed):.0e}" if agreed else "-"])
    return table_text(Table("", heads, rows))


if __name__ == "__main__":
    sys.exit(main())
