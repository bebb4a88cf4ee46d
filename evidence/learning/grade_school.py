"""Measures GRPO after SFT against SFT alone on SmolLM2-135M and grade-school problems of templates held out.

    python -m evidence.learning.grade_school

Base, SFT on worked answers, GRPO: after each, eight answers to every held-out problem; all seeds share the base's. What
is compared is a template's share of right answers, before and after, with a bootstrap over templates. An answer is
right if its number stands after ####; the share of right numbers wherever they stand tells form from skill. Weights are
bfloat16, as on a card. A stage that is done is not done again.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from evidence.learning.commands import command_line, curve, each_seed, evaluate, parsed, train
from nanorlhf.rewards.numeric import numeric
from nanorlhf.scripts.statistics import pass_at
from nanorlhf.tasks.grade_school import gsm_symbolic

ANSWERS = 8
RECIPE, MODEL = "gsm_symbolic", "nanorlhf:smollm2"
AFTER = ("base", "sft", "grpo")
DTYPE = ("--dtype", "bfloat16")
TINY = ("--model_name_or_path", "nanorlhf:adder", "--engine", "hf", "--eval_prompts", "16")
SHORT = ("--max_completion_length", "16")  # of what is sampled, not of what SFT copies


def main(argv: list[str] | None = None) -> int:
    """Goes through what is missing, seed after seed, and keeps each seed's figures as it ends."""
    args = parsed(command_line(__doc__), argv, "smollm2_gsm")
    tiny = args.size == "tiny"
    print(table(each_seed(args.output, args.seeds, lambda seed: measure(args.runs / f"seed{seed}", seed, tiny))))
    return 0


def measure(folder: Path, seed: int, tiny: bool) -> dict[str, Any]:
    """The stages, each from the adapter of the one before, and the held-out answers after each."""
    folder.mkdir(parents=True, exist_ok=True)
    common = ["--seed", str(seed), *(TINY if tiny else DTYPE)]
    training = [*common, "--max_steps", "2"] if tiny else common
    sampling = SHORT if tiny else ()
    train("sft", RECIPE, folder / "sft", training)
    train("grpo", RECIPE, folder / "grpo", [*training, *sampling, "--adapter_name_or_path", str(folder / "sft")])
    right: dict[str, dict[str, list[bool]]] = {}
    unmarked: dict[str, dict[str, list[bool]]] = {}
    for name in AFTER:
        model = MODEL if name == "base" else str(folder / name)
        path = (folder.parent if name == "base" else folder) / f"{name}.json"
        samples = evaluate(path, model, f"grpo/recipes/{RECIPE}", ANSWERS, [*common, *sampling])
        right[name] = by_problem(samples, [sample["reward"] == 1 for sample in samples])
        unmarked[name] = by_problem(samples, numbers_right(samples))
    return {"right": right, "unmarked": unmarked, "stages": {name: curve(folder / name) for name in AFTER[1:]}}


def by_problem(samples: Sequence[dict[str, Any]], verdicts: Sequence[bool]) -> dict[str, list[bool]]:
    """Which answers to each held-out problem, by its row, were right."""
    found = defaultdict[str, list[bool]](list)
    for sample, verdict in zip(samples, verdicts, strict=True):
        found[str(sample["index"])].append(verdict)
    return found


def numbers_right(samples: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each answer's number, marked or else its last one, is right."""
    worked = gsm_symbolic("test")["answer"]
    scores = numeric([sample["completion"] for sample in samples], [worked[sample["index"]] for sample in samples])
    return [score == 1 for score in scores]


def by_template(right: dict[str, list[bool]], k: int) -> dict[int, float]:
    """The mean chance, over a template's problems, that one of k answers is right."""
    templates, found = gsm_symbolic("test")["template"], defaultdict[int, list[float]](list)
    for row, answers in right.items():
        found[templates[int(row)]].append(pass_at(k, answers))
    return {template: fmean(chances) for template, chances in found.items()}


def gain(runs: Sequence[dict[str, Any]], k: int) -> tuple[float, float, float]:
    """GRPO's pass@k less SFT's: the mean over templates of the mean over seeds, and its 95% interval by bootstrap."""
    differences = defaultdict[int, list[float]](list)
    for run in runs:
        sft, grpo = (by_template(run["right"][name], k) for name in AFTER[1:])
        for template, before in sft.items():
            differences[template].append(grpo[template] - before)
    values = [fmean(some) for some in differences.values()]
    drawn = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    return fmean(values), float(drawn.low), float(drawn.high)


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Pass@1 and pass@8 of every seed and stage, the share of right numbers, and what GRPO adds to SFT."""
    lines = ["| seed | after | pass@1 | pass@8 | number right | seconds of steps |", "|---|---|---|---|---|---|"]
    for run in runs:
        for name, right in run["right"].items():
            cells = [f"{fmean(by_template(right, k).values()):.3f}" for k in (1, ANSWERS)]
            cells.append(f"{fmean(by_template(run['unmarked'][name], 1).values()):.3f}")
            seconds = f"{run['stages'][name]['training_seconds']:.0f}" if name in run["stages"] else "-"
            lines.append(f"| {run['seed']} | {name} | {' | '.join(cells)} | {seconds} |")
    lines.append("")
    for k in (1, ANSWERS):
        mean, low, high = gain(runs, k)
        words = f"{mean:+.3f} (95% interval over templates {low:+.3f} to {high:+.3f})"
        lines.append(f"- pass@{k}: GRPO after SFT, less SFT alone: {words}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
