"""Measures what README and docs claim, and writes their tables; goes on where it was stopped.

Comparisons leave results/<claim>.json, every other measurement one of its own; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from evidence.learning import counting, grade_school, recipes, rlhf
from evidence.results import RESULTS, ROOT
from evidence.speed import benchmark
from evidence.speed.scaling import draw_sharing
from nanorlhf.scripts import compare
from nanorlhf.scripts.comparing.publish import read_runs, table_text, tables
from nanorlhf.scripts.comparing.verdicts import verdicts
from nanorlhf.scripts.reporting.page import Table

ALGORITHMS = ("grpo", "ppo", "rloo", "remax", "raft", "reinforce")
SHORTER = ("--max_completion_length", "2048", "--steps", "6", "--eval_steps", "2")
LEAST_SQUARES = "ppo:value_init_prompts=32,value_init_epochs=0"  # a critic's ten epochs take as long as all its steps
CLAIMS = {
    "algorithms": [*ALGORITHMS],
    "engines": ["grpo:engine=vllm", "grpo:engine=vllm,weight_sync=lora", "grpo:engine=hf"],
    "family": [f"grpo:{name}" for name in ("dapo", "dr_grpo", "gspo", "cispo", "sapo")],
    "smollm2_algorithms": [*ALGORITHMS, "--recipe", "digits", "--steps", "20"],
    "counting_algorithms": ["grpo", LEAST_SQUARES, *ALGORITHMS[2:], "--recipe", "grpo/recipes/counting.yaml", *SHORTER],
}
SCRIPTS = {  # by the file that each leaves
    "value_init": "learning.value_init",
    "gym": "learning.reasoning_gym",
    "richness": "learning.recipes richness",
    "digits": "learning.recipes digits",
    "smollm2_richness": "learning.recipes smollm2_richness",
    "smollm2_gsm": "learning.grade_school",
    "smollm2_rlhf": "learning.rlhf",
    "overlap": "speed.slow_rewards",
    "step_times": "speed.step_times",
    "decode_step": "speed.decode_step",
    "lengths": "speed.lengths",
    "partial_rollouts": "learning.partial_rollouts",
    "counting": "learning.counting",
    "planted": "learning.planted_differences",
    "planted_bugs": "plant_bugs",
    "kills": "survival.kills",
    "soak": "survival.soak",
    "processes": "learning.several_processes",
    **{f"benchmark_{name}": f"speed.benchmark --only {name}" for name in benchmark.NAMES},
}
SEEDED = {"value_init", "gym", "counting", *recipes.RUNS, "smollm2_gsm", "smollm2_rlhf"}  # may lack seeds
RIVALRY = {  # what each benchmark against TRL is about
    "update": "GRPO's update, skewed lengths",
    "even": "the same, all of one length",
    "outlier": "the same, one of 4,096 tokens among short ones",
    "rloo": "RLOO's update",
    "sft": "SFT's update",
    "dpo": "DPO's update",
    "step": "whole steps of GRPO, each with its engine",
    "smol": "SmolLM2-135M, GRPO's update, prompts of 90, answers of 9",
    "smol_lean": "the same, each side with as little memory as it can",
    "smol_long": "SmolLM2-135M, the same update, prompts of 400, answers of 40",
    "smol_step": "SmolLM2-135M, whole steps of GRPO",
    "goal": "the shipped task, until .90",
    "smol_goal": "SmolLM2-135M, one-digit arithmetic, until .80",
    "refresh": "new weights for vLLM",
}
SECONDS, MEMORY = "seconds", "above_start_mib"
STRONGEST = [  # what the README shows: a benchmark, one of its figures, and what was measured, in plain words
    ("update", SECONDS, "one update of GRPO, answers of skewed lengths"),
    ("update", MEMORY, "the memory of that update"),
    ("outlier", SECONDS, "the same, one answer of 4,096 tokens among short ones"),
    ("smol", SECONDS, "one update of GRPO, SmolLM2-135M, 8 prompts x 8 answers"),
    ("smol_step", SECONDS, "a whole step of GRPO, SmolLM2-135M, both through vLLM"),
    ("step", SECONDS, "a whole step of GRPO, a model of 11.5M parameters, both through vLLM"),
    ("smol_goal", SECONDS, "SmolLM2-135M, until .80 of one-digit arithmetic is right"),
]
TRACKS = {  # of the board of records, by the benchmark that is a run of it
    "goal": ("tiny", "the shipped adder, held-out reward .90"),
    "smol_goal": ("smol", "SmolLM2-135M, one-digit arithmetic in tags, .80"),
}
ANSWERS = ("smollm2_richness",)  # of which a page shows examples
PICTURES = ("reward_by_time", "reward_by_samples", "phases")
PAGES = ("README.md", "docs/measured.md", "docs/records.md", "docs/real_model.md", "docs/long_answers.md")
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
    for page in PAGES:
        write_tables(ROOT / page)
    draw_pictures(ROOT / "docs")
    return bool(failed)


def draw_pictures(docs: Path) -> None:
    """The pictures of single measurements."""
    drawn = {
        "benchmark_sharing": (draw_sharing, "shared_prompts"),
        "digits": (recipes.draw, "digits"),
        "smollm2_rlhf": (rlhf.draw, "rlhf"),
    }
    for name, path in there(drawn):
        draw, picture = drawn[name]
        draw(json.loads(path.read_text()), docs / f"{picture}.png")


def made(claim: str, seeds: int) -> bool:
    """Whether a claim's results are there, now or since earlier."""
    if (RESULTS / f"{claim}.json").exists() and claim not in SEEDED:
        return True
    if claim in SCRIPTS:
        words = [sys.executable, "-m", *f"evidence.{SCRIPTS[claim]}".split()]
        return subprocess.run(words, cwd=ROOT, check=False).returncode == 0
    folder = ROOT / "runs" / "evidence" / claim
    if compare.main([*CLAIMS[claim], "--seeds", str(seeds), "--output", str(folder)]):
        return False
    keep(claim, folder)
    return True


def keep(claim: str, folder: Path) -> None:
    """Keeps what pages show of a comparison."""
    shutil.copy(folder / "comparison.json", RESULTS / f"{claim}.json")
    if claim == "smollm2_algorithms":
        shutil.copy(folder / "reward_by_time.png", ROOT / "docs" / "smollm2_reward_by_time.png")
    if claim == "algorithms":
        for name in PICTURES:
            shutil.copy(folder / f"{name}.png", ROOT / "docs" / f"{name}.png")
        for name in ALGORITHMS:
            shutil.copy(folder / "runs" / f"{name}-seed0" / "learning_curve.png", ROOT / name)


def there(names: Iterable[str], prefix: str = "") -> list[tuple[str, Path]]:
    """Those of which there are results."""
    paths = [(name, RESULTS / f"{prefix}{name}.json") for name in names]
    return [(name, path) for name, path in paths if path.exists()]


def write_tables(page: Path) -> None:
    """Puts each table of which there are results between its marks in a page, if it has them."""
    text = page.read_text()
    for name, table in all_tables().items():
        before, mark, rest = text.partition(START.format(name))
        if mark:
            text = f"{before}{mark}\n{table()}\n{END}{rest.partition(END)[2]}"
    page.write_text(text)


def all_tables() -> dict[str, Callable[[], str]]:
    """The tables' writers, by the names that their marks have."""
    writers = dict.fromkeys(recipes.RUNS, recipes.table)
    writers |= {"smollm2_gsm": grade_school.table, "smollm2_rlhf": rlhf.table, "counting": counting.table}
    of_files = {name: partial(from_file, writers[name], path) for name, path in there(writers)}
    of_files |= {f"{name} answers": partial(from_file, recipes.examples, path) for name, path in there(ANSWERS)}
    of_files |= {claim: partial(comparison_text, path) for claim, path in there(CLAIMS)}
    return of_files | {"strongest": strongest, "records": records, "rivalry": rivalry}


def from_file(write: Callable[[Any], str], path: Path) -> str:
    """A table of the figures in a file."""
    return write(json.loads(path.read_text()))


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
    for name, path in there(RIVALRY, "benchmark_"):
        found = json.loads(path.read_text())
        agreed = found["agreement"].values()
        ours, theirs = zip(*(both_sides(found, figure) for figure in (SECONDS, MEMORY)), strict=True)
        cells = [f"{side:,.0f}" if side >= 100 else f"{side:.2g}" for side in (*ours, *theirs)]
        ratios = [ratio(found, figure) for figure in (SECONDS, MEMORY)]
        if name in TRACKS:  # TRL's process has the judge's model, too
            cells[1] = cells[3] = ratios[1] = "-"
        rows.append([RIVALRY[name], *cells, *ratios, f"{max(agreed):.0e}" if agreed else "-"])
    return table_text(Table("", heads, rows))


def both_sides(found: dict[str, Any], figure: str) -> tuple[float, float]:
    """Our first setting's median, and TRL's at its best setting for that figure."""
    ours = next(iter(found["medians"].values()))
    return ours[figure], found["medians"][found["trl_best"][figure]][figure]


def ratio(found: dict[str, Any], figure: str) -> str:
    """TRL's best over ours, which is more if TRL gave up."""
    ours, theirs = both_sides(found, figure)
    gave_up = any(run.get("gave_up") and run["setting"] == found["trl_best"][figure] for run in found["runs"])
    if gave_up and figure == SECONDS:
        return f">{math.floor(10 * theirs / ours) / 10:.1f}"
    return f"{theirs / ours:.1f}"


def strongest() -> str:
    """The results that the README shows: ours, TRL's at its best setting for that figure, and the ratio."""
    units = {SECONDS: "s", MEMORY: "MiB"}
    rows: list[list[str]] = []
    for name, figure, what in STRONGEST:
        path = RESULTS / f"benchmark_{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            cells = [f"{side:,.0f}" if side >= 10 else f"{side:.1f}" for side in both_sides(found, figure)]
            rows.append([what, *(f"{cell} {units[figure]}" for cell in cells), ratio(found, figure)])
    return table_text(Table("", ["what was measured", "nanorlhf", "TRL 1.16", "ratio"], rows))


def records() -> str:
    """Every track's latest record: medians over its seeds, TRL's in the same run beside them."""
    heads = [
        "track",
        "goal",
        "seconds from start",
        "of steps",
        "steps",
        "TRL: of steps",
        "steps",
        "date",
        "commit",
        "machine",
    ]
    rows: list[list[str]] = []
    for name, path in there(TRACKS, "benchmark_"):
        found = json.loads(path.read_text())
        sides = {mine: [r for r in found["runs"] if r["setting"].startswith("ours") == mine] for mine in (True, False)}
        fastest = {mine: fastest_of(runs) for mine, runs in sides.items() if runs}
        cells = [word for mine in fastest for word in race(fastest[mine])]
        started = [run["from_start_seconds"] for run in fastest[True] if "from_start_seconds" in run]
        start = f"{median(started):.0f}" if started else "-"
        machine = f"{found['machine']['cores']} cores, {found['machine']['cpu']}"
        rows.append([*TRACKS[name], start, *cells, found["date"][:10], found["commit"][:7], machine])
    return table_text(Table("", heads, rows))


def fastest_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of the setting whose median is smallest."""
    settings = {run["setting"]: [r for r in runs if r["setting"] == run["setting"]] for run in runs}
    return min(settings.values(), key=lambda some: median(run["seconds"] for run in some))


def race(runs: list[dict[str, Any]]) -> list[str]:
    """Seconds of steps and steps, or how many never got there."""
    never = sum(not run["reached"] for run in runs)
    words = f" ({never} of {len(runs)} never)" if never else ""
    seconds, steps = (median(run[name] for run in runs) for name in ("seconds", "steps"))
    return [f"{seconds:.1f}{words}", f"{steps:g}"]


if __name__ == "__main__":
    sys.exit(main())
