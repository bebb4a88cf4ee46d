"""A model card: how a model was made, what came of it, and how it is loaded, for the hub and beside a merged model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.config.option import defaults
from nanorlhf.records.directory import RunRecord, training_seconds
from nanorlhf.scoring.workers import SECRET

# Options that a card has whether they are the usual ones or not.
USED = ("model_name_or_path", "dataset_name", "reward_funcs", "prompts_per_step", "num_generations", "max_steps")
USED += ("learning_rate", "kl_coef", "temperature", "max_completion_length", "lora", "lora_r", "lora_alpha", "seed")
LEFT_OUT = ("output_dir", "resume", "overwrite_output_dir", "run_name")  # of this machine, or said elsewhere
SHOWN = ("eval/reward", "eval/accuracy", "eval/loss", "reward/mean", "kl", "entropy", "completion/length_mean")
CURVE = "learning_curve.png"


@dataclass(frozen=True, slots=True)
class Saved:
    """A model in a folder, as its card has to speak of it."""

    record: RunRecord  # of the run that made it
    step: int  # after which it was saved
    adapter: bool  # to be laid over the base, or else whole
    where: str  # the name to load it by
    base: str | None  # the base model's name on the hub, if it has one


def write(saved: Saved, folder: Path) -> None:
    """Writes README.md, and the picture of the learning curve that it shows."""
    from nanorlhf.records.plots import draw_png  # here, so that --help is quick

    rows = [row for row in saved.record.rows if row["step"] <= saved.step]
    if drawn := any("time/step" in row for row in rows):
        draw_png(rows, folder / CURVE, saved.record.name)
    (folder / "README.md").write_text(card(saved, rows, drawn), encoding="utf-8")


def card(saved: Saved, rows: list[dict[str, Any]], drawn: bool = False) -> str:
    """The text: a head for the hub's search, how to load the model, its results and its recipe."""
    record, options = saved.record, saved.record.options
    base = saved.base or options["model_name_or_path"] or "a model made in Python"
    learned = "what it learned is an adapter for that model" if saved.adapter else "what it learned is in the weights"
    standard = standard_of(record)
    unlike = {k: v for k, v in options.items() if k not in standard or v != standard[k]}
    recipe = {k: public(v) for k, v in options.items() if (k in unlike or k in USED) and k not in LEFT_OUT}
    picture = f"![reward of the steps, and held out]({CURVE})\n\n" if drawn else ""
    made_by = [f"{name} {number}" for name, number in record.about.get("versions", {}).items()]
    cost = [f"{training_seconds(rows):,.0f} s of training", *filter(None, [record.about.get("machine")]), *made_by]
    return (
        f"---\n{head(saved, rows)}\n---\n# {record.name}\n\n"
        f"{base}, trained by nanorlhf ({record.algorithm}) for {saved.step} steps; {learned}.\n\n"
        f"```python\n{loading(saved)}\n```\n\n"
        f"## Results\n\n{picture}{results(rows)}\n\n"
        f"{', '.join(cost)}.\n\n"
        f"## Recipe\n\n{again(record, rows)}\n\n"
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n"
    )


def again(record: RunRecord, rows: list[dict[str, Any]]) -> str:
    """The way to run it again, or those parts that no file of options holds."""
    named = (("the model", "model_name_or_path"), ("the data", "dataset_name"))
    made = [part for part, option in named if not record.options[option]]
    if not record.options["reward_funcs"]:
        rewards = {found[1] for row in rows for key in row if (found := re.fullmatch(r"reward/(\w+)/failed", key))}
        made += [f"the reward {name}" for name in sorted(rewards - {"environment"})]
    if made:
        return f"Options that are not named are as usual. Made in Python: {', '.join(made)}."
    return f"`nanorlhf {record.algorithm} --recipe recipe.yaml` runs this file; what it does not name is as usual."


def head(saved: Saved, rows: list[dict[str, Any]]) -> str:
    """The card's metadata in YAML; names are only those that the hub can know."""
    from huggingface_hub import EvalResult, ModelCardData

    record, judge = saved.record, saved.record.algorithm == "reward_model"
    task, name = "text-classification" if judge else "text-generation", record.options["dataset_name"]
    dataset = hub_name(name) if "/" in name else None  # others are built in
    measured = [
        EvalResult(
            task_type=task,
            dataset_type=dataset or "custom",
            dataset_name=Path(name).name or "custom",
            dataset_split=record.options["dataset_test_split"],
            metric_type=metric.removeprefix("eval/"),
            metric_value=round(found[-1][1], 4),
        )
        for metric in ("eval/reward", "eval/accuracy")
        if (found := ends(rows, metric))
    ]
    tags = ["nanorlhf", record.algorithm, *(["lora"] if saved.adapter else [])]
    data = ModelCardData(
        base_model=saved.base,
        datasets=dataset,
        eval_results=measured or None,
        library_name="peft" if saved.adapter else "transformers",
        model_name=record.name,
        pipeline_tag=task,
        tags=tags,
    )
    return data.to_yaml()


def loading(saved: Saved) -> str:
    """The lines of Python that load it."""
    kind = "SequenceClassification" if saved.record.algorithm == "reward_model" else "CausalLM"
    name = f"Auto{'Peft' if saved.adapter else ''}ModelFor{kind}"
    imports = f"from peft import {name}\nfrom transformers import AutoTokenizer"
    return (
        f"{imports if saved.adapter else f'from transformers import {name}, AutoTokenizer'}\n\n"
        f"model = {name}.from_pretrained({saved.where!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({saved.where!r})"
    )


def ends(rows: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """The step and value of a metric where it was first and last measured; nothing if it never was."""
    found = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [found[0], found[-1]] if found else []


def results(rows: list[dict[str, Any]]) -> str:
    """A table of each metric's first and last value."""
    measured = {metric: ends(rows, metric) for metric in SHOWN}
    lines = [[name, *(f"{value:.4g} (step {at})" for at, value in found)] for name, found in measured.items() if found]
    return "\n".join(["| | first | last |", "|---|---|---|", *(f"| {' | '.join(line)} |" for line in lines)])


def hub_name(name: str) -> str | None:
    """The name of a model or a dataset if the hub can have it by that name: None for a file or a folder."""
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists() else None


def public(value: Any) -> Any:
    """An option's value without a key or a password that a reward was given in it."""
    if not isinstance(value, dict):
        return value
    return {k: "(left out)" if isinstance(v, str) and SECRET.search(str(k)) else public(v) for k, v in value.items()}


def standard_of(record: RunRecord) -> dict[str, Any]:
    """The options of a run's algorithm if nothing is said; of a user's own, those of the one that it is like."""
    if record.algorithm in ALGORITHMS:
        return options_of(record.algorithm)
    like = (options for name in ALGORITHMS if record.options.keys() <= (options := options_of(name)).keys())
    return next(like, {})


def options_of(algorithm: str) -> dict[str, Any]:
    """An algorithm's options with their defaults."""
    package = import_module(f"nanorlhf.{algorithm}")
    return defaults(getattr(package, next(name for name in package.__all__ if name.endswith("Config"))))
