"""Measures the whole pipeline on SmolLM2-135M: SFT, a reward model, then PPO and Online DPO against it.

    python -m evidence.learning.rlhf

The task's true score, lexical richness, is known: it grades the pairs that the reward model learns from, and stands
beside the learned score while PPO and Online DPO raise that. Every stage is a command; one that is done is not done
again.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.learning.commands import command_line, curve, each_seed, evaluate, parsed, train
from evidence.results import ROOT

ANSWERS = 4  # of each prompt, to choose from and to compare
LONGEST = 48  # tokens of an answer, in the stages' recipes too
AGAINST = ("ppo", "online_dpo")
RECIPE = "smollm2_richness"
MODEL = "nanorlhf:smollm2"


@dataclass(frozen=True, slots=True)
class Size:
    """Prompts of each kind, and options of every command and of those that train."""

    demonstrations: int = 96
    pairs: int = 512
    unseen: int = 96
    common: tuple[str, ...] = ()
    training: tuple[str, ...] = ()


TINY = (
    "--model_name_or_path",
    "nanorlhf:storyteller",
    "--chat_template",
    "plain",
    "--engine",
    "hf",
    "--eval_prompts",
    "4",
)
SIZES = {"full": Size(), "tiny": Size(4, 8, 4, TINY, ("--max_steps", "2"))}
JUDGES = "[model:{}, lexical_richness]"


def main(argv: list[str] | None = None) -> int:
    """Goes through what is missing, seed after seed, and keeps each seed's figures as it ends."""
    parser = command_line(__doc__)
    parser.add_argument("--picture", type=Path, help="(default: docs/rlhf.png, of a trial beside its results)")
    args = parsed(parser, argv, "smollm2_rlhf")
    picture = args.picture or (ROOT / "docs" if args.size == "full" else args.output.parent) / "rlhf.png"
    size = SIZES[args.size]
    done = each_seed(args.output, args.seeds, lambda seed: pipeline(args.runs / f"seed{seed}", seed, size))
    draw(done, picture)
    print(table(done))
    return 0


def pipeline(folder: Path, seed: int, size: Size) -> dict[str, Any]:
    """The stages, each from what the one before left in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = ["--seed", str(seed), *size.common]
    common = [*written, *size.training]
    first, rest = f"train[:{size.demonstrations}]", f"train[{size.demonstrations}:]"

    def answers(name: str, model: str, split: str, prompts: int) -> list[dict[str, Any]]:
        options = [*written, "--dataset_test_split", split, "--eval_prompts", str(prompts)]
        options += ["--max_completion_length", str(LONGEST)]
        return evaluate(folder / f"{name}.json", model, f"rloo/recipes/{RECIPE}", ANSWERS, options)

    base = answers("base", MODEL, first, size.demonstrations)
    rows(folder / "demonstrations.jsonl", best(base))
    train("sft", RECIPE, folder / "sft", ["--dataset_name", str(folder / "demonstrations.jsonl"), *common])
    graded = list(grades(answers("sft", str(folder / "sft"), rest, size.pairs + size.unseen)))
    rows(folder / "pairs.jsonl", graded[: size.pairs])
    rows(folder / "unseen.jsonl", graded[size.pairs :])
    data = ["--dataset_name", str(folder / "pairs.jsonl"), "--dataset_test_name", str(folder / "unseen.jsonl")]
    train("reward_model", RECIPE, folder / "reward_model", [*data, *common])
    judges = ["--reward_funcs", JUDGES.format(folder / "reward_model"), "--reward_weights", "1,0"]
    start = ["--adapter_name_or_path", str(folder / "sft")]
    for algorithm in AGAINST:
        train(algorithm, RECIPE, folder / algorithm, [*start, *judges, *common])
    names = ("sft", "reward_model", *AGAINST)
    return {"stages": {name: curve(folder / name) for name in names}}


def by_prompt(samples: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The answers to each prompt."""
    groups = defaultdict[int, list[dict[str, Any]]](list)
    for sample in samples:
        groups[sample["index"]].append(sample)
    yield from groups.values()


def best(samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows for SFT: each prompt with the answer of highest score."""
    for group in by_prompt(samples):
        chosen = max(group, key=lambda sample: sample["reward"])
        yield {"prompt": chosen["prompt"], "completion": chosen["completion"]}


def grades(samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows for the reward model: each prompt with its answers and their scores."""
    for group in by_prompt(samples):
        answers = {"completions": [s["completion"] for s in group], "scores": [s["reward"] for s in group]}
        yield {"prompt": group[0]["prompt"]} | answers


def rows(path: Path, content: Any) -> None:
    """A dataset in a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


def draw(done: list[dict[str, Any]], path: Path) -> None:
    """The learned score and the true one, side by side, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, score, title in zip(panels, ("model", "lexical_richness"), ("learned score", "true score"), strict=True):
        for algorithm, colour in zip(AGAINST, ("C0", "C1"), strict=True):
            for number, run in enumerate(done):
                points = run["stages"][algorithm]["curve"]
                label = None if number else {"ppo": "PPO", "online_dpo": "Online DPO"}[algorithm]
                axes.plot([p["step"] for p in points], [p[score] for p in points], color=colour, label=label)
        axes.set(xlabel="steps", title=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def table(done: list[dict[str, Any]]) -> str:
    """A row for each seed and stage."""
    lines = ["| seed | stage | held out, before and after | seconds of steps |", "|---|---|---|---|"]
    for run in done:
        for name, stage in run["stages"].items():
            first, last = (stage["curve"][end] if stage["curve"] else {} for end in (0, -1))
            wanted = (
                "accuracy",
                "accuracy/of_longer",
                "accuracy/alike_length",
                "model",
                "lexical_richness",
                "reward",
                "loss",
            )
            shown = [f"{n} {first[n]:.2f} -> {last[n]:.2f}" for n in wanted if last.get(n) is not None]
            lines.append(f"| {run['seed']} | {name} | {'; '.join(shown)} | {stage['training_seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
