"""Held-out scores of any run, checkpoint or base model: greedy, sampled, pass@k and majority@k, with intervals.

    python -m nanorlhf.scripts.evaluate runs/mine --samples 8
    python -m nanorlhf.scripts.evaluate Qwen/Qwen2.5-0.5B --recipe grpo/recipes/gsm8k.yaml --samples 8

A run's own config.yaml says model, data and rewards; a recipe lies over it, and options on the command line over both.
With --output, what is finished is kept as the evaluation goes on, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from nanorlhf.cli import parse, read_yaml
from nanorlhf.config import names
from nanorlhf.config.aliases import ALIASES, rename
from nanorlhf.config.names import shipped_model
from nanorlhf.config.option import config, defaults, option, split_names
from nanorlhf.config.task import TaskConfig
from nanorlhf.config.training import TrainConfig
from nanorlhf.data.answers import last_boxed, last_number, last_tagged
from nanorlhf.errors import RewardError, UsageError
from nanorlhf.scripts.resumable import Kept, stamps
from nanorlhf.system.files import write_whole
from nanorlhf.system.seeds import derive
from nanorlhf.system.signals import INTERRUPTED
from nanorlhf.system.user_code import is_file_spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanorlhf.types import Prompt, Sample

CHUNK = 1024  # completions that are kept together once they are scored


@config
class EvaluateConfig(TaskConfig):
    """Evaluates a model on held-out prompts: give it a run, a checkpoint or a model first."""

    samples: int = option(1, "Sampled completions for each prompt.", "evaluation", first=True, least=0)
    greedy: bool = option(True, "A greedy completion for each prompt too.", "evaluation", first=True)
    pass_at: float = option(1.0, "The reward from which on a completion passes.", "evaluation", first=True)
    output: str | None = option(
        None,
        "Where results go (JSON; completions beside it as JSON lines); none: only to the screen.",
        "evaluation",
        first=True,
    )

    def validate(self) -> None:
        super().validate()
        self.require(self.samples > 0 or self.greedy, "samples", "without greedy there must be some")


def main(argv: list[str] | None = None) -> int:
    """Gives 0 if everything could be evaluated, 1 if a reward failed, 2 if the command cannot work, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    subject = words.pop(0) if words and not words[0].startswith("-") else ""
    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--recipe", default="")
    recipe, others = recipes.parse_known_args(words)
    try:
        known, model = about(subject)
        for path in split_names(recipe.recipe):
            known |= task_part(Path(path))
        below = known | model
        print_only, chosen = parse(EvaluateConfig, "evaluate", Path(), others, below)
        if print_only:
            print(yaml.safe_dump(chosen.to_dict(), sort_keys=False), end="")
            return 0
        print(f"evaluate: {chosen.adapter_name_or_path or chosen.model_name_or_path or 'no model'}", flush=True)
        results, rows = evaluate(chosen)
        print("\n".join(f"{name:>16}  {shown(value)}" for name, value in results.items()))
        if chosen.output:
            write(Path(chosen.output), results, rows)
            partial(chosen.output).unlink()
    except (UsageError, RewardError) as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("evaluate: interrupted; with --output the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def about(subject: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the task, and of the model, that a run directory, a checkpoint or a model's name gives."""
    if not subject:
        return {}, {}

    where = Path(subject)
    run = next((folder for folder in (where, names.run_of(subject)) if (folder / "config.yaml").is_file()), None)
    folder = names.latest(where) if run == where else where
    if folder is None:
        raise UsageError(f"{subject!r} has no checkpoint yet")
    kind = "adapter_name_or_path" if (folder / "adapter_config.json").is_file() else "model_name_or_path"
    return task_part(run / "config.yaml") if run else {}, {kind: str(folder) if run else subject}


def task_part(recipe: Path) -> dict[str, Any]:
    """Those options of a recipe that are not about training, under the names they have here."""
    if not recipe.is_file():
        raise UsageError(f"there is no recipe {str(recipe)!r}")
    known, given = defaults(TaskConfig), read_yaml(recipe.read_text())
    names = known.keys() | {name for name, alias in ALIASES.items() if getattr(alias, "name", "") in known}
    return rename({name: value for name, value in given.items() if name in names}, known)


def as_read_only(task: TrainConfig) -> TrainConfig:
    """The options under which a model is only asked; refuses a run's tools that no name leads to."""
    from nanorlhf.system.device import pick_device

    why = "the run had tools that were given in Python; name them, as in tools.py:add,tools.py:look"
    task.require("tools" not in task.chat_template_kwargs or bool(task.tools), "tools", why)
    half = task.dtype == "auto" and pick_device(task.device).type == "cuda"  # no master weights are needed
    return dataclasses.replace(task, dtype="bfloat16") if half else task


def evaluate(chosen: EvaluateConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every figure by its name, and every completion."""
    import transformers  # here, and what imports torch, so that --help is quick
    from tqdm.auto import tqdm

    from nanorlhf import preflight
    from nanorlhf.algorithm import Algorithm, Samples
    from nanorlhf.assembly import how_to_sample, make_sampler
    from nanorlhf.data.streaming import prompts_of
    from nanorlhf.data.templates import use_template
    from nanorlhf.engines.launch import build_engine
    from nanorlhf.environments.protocol import stops
    from nanorlhf.policy.policy import Policy
    from nanorlhf.scoring.scorer import Scorer
    from nanorlhf.system import gpu_memory

    transformers.utils.logging.disable_progress_bar()
    chosen.require(bool(chosen.model_name_or_path), "model_name_or_path", "give a run, a checkpoint or a model first")
    shared = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(TaskConfig)}
    task = as_read_only(TrainConfig(**shared, lora="all-linear" if chosen.adapter_name_or_path else "none"))
    preflight.check_size(chosen, {"samples": max(CHUNK, chosen.samples + chosen.greedy)})
    entry = preflight.check(task, None, None, None, None, None, Algorithm)
    task, held_out, environment = entry.config, entry.held_out, entry.environment
    tokenizer = tokenizer_of(task)
    use_template(tokenizer, task)
    seen = prompts_of(entry.train, tokenizer, task)
    unseen = seen if held_out is None else prompts_of(held_out, tokenizer, task, None, seen.examples)
    if held_out is None:
        print("no held-out split is named (dataset_test_split), so these are prompts of the training split")
    prompts = unseen.held_out(task.eval_prompts)
    gpu_memory.hold(task.gpu_memory_gib)
    policy = Policy(task)
    sampling = how_to_sample(task, policy, tokenizer, stops(environment))
    scorer, wanted = Scorer(entry.rewards, task), Samples(chosen.samples, chosen.greedy)
    parts = chunks(prompts, chosen)
    kept = Kept(partial(chosen.output) if chosen.output else None, question(chosen))
    if kept.parts:
        print(f"going on with an evaluation of which {len(kept.parts)} of {len(parts)} parts were finished", flush=True)
    with tempfile.TemporaryDirectory() as folder, closing(scorer):
        if len(kept.parts) < len(parts):
            with closing(build_engine(task, policy, tokenizer, sampling, Path(folder))) as engine:
                engine.update(policy)
                sampler = make_sampler(task, engine, tokenizer, scorer, sampling.stop_token_ids, environment)
                with tqdm(unit=" tokens", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
                    for number in range(len(kept.parts), len(parts)):
                        seed = derive(task.seed, "evaluation", number)
                        samples, greedy = sampler.write(parts[number], wanted, seed, progress=bar.update)
                        scorer.finish([*samples, *greedy])
                        kept.add([row(s, greedy=False) for s in samples] + [row(s, greedy=True) for s in greedy])
        scorer.report()
    rows = sorted((row for part in kept.parts for row in part), key=lambda row: row["greedy"])
    return figures(chosen, rows), rows


def tokenizer_of(task: TrainConfig) -> PreTrainedTokenizerBase:
    """A checkpoint's own, whose template may be the run's alone; else the base model's."""
    from nanorlhf.assembly import load_tokenizer
    from nanorlhf.data.templates import read_tokenizer

    own = task.adapter_name_or_path
    if own and (Path(own) / "tokenizer_config.json").is_file():
        return read_tokenizer(own, "adapter_name_or_path", task.trust_remote_code)
    return load_tokenizer(task, None)


def chunks(prompts: Sequence[Prompt], chosen: EvaluateConfig) -> list[Sequence[Prompt]]:
    """Prompts with some CHUNK completions together, which is what an interruption may cost."""
    size = max(1, CHUNK // (chosen.samples + chosen.greedy))
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


def partial(output: str) -> Path:
    """The file of finished parts while others are not finished."""
    return beside(Path(output), ".partial.jsonl")


def beside(path: Path, ending: str) -> Path:
    """A file that belongs to an output; its name may have dots of its own."""
    return path.with_name(path.name.removesuffix(".json") + ending)


def question(chosen: EvaluateConfig) -> dict[str, Any]:
    """All that an answer hangs on: options, and the files that they name."""
    specs = [chosen.dataset_name, chosen.dataset_test_name, chosen.environment, *split_names(chosen.reward_funcs)]
    paths = [Path(spec.rpartition(":")[0] if is_file_spec(spec) else spec) for spec in specs if spec]
    models = [chosen.model_name_or_path, chosen.adapter_name_or_path]
    paths += [Path(shipped_model(name)) for name in models if name]
    return {"options": chosen.to_dict(), "files": stamps(*paths)}


def figures(chosen: EvaluateConfig, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the scores come to; prompts without a scored completion are left out."""
    from nanorlhf.scripts.statistics import estimate, majority_at, pass_at

    greedy = [r for r in rows if r["greedy"]]
    samples = [r for r in rows if not r["greedy"]]
    names: dict[str, Any] = {"prompts": len(greedy) or len(samples) // chosen.samples}
    scored = [r["reward"] for r in greedy if r["reward"] is not None]
    if scored:
        names["greedy reward"] = estimate(scored)
        names["greedy passes"] = estimate([float(reward >= chosen.pass_at) for reward in scored])
    groups = [samples[i : i + chosen.samples] for i in range(0, len(samples), chosen.samples or 1)]
    groups = [[r for r in group if r["reward"] is not None] for group in groups]
    groups = [group for group in groups if group]
    if groups:
        names["sampled reward"] = estimate([fmean(r["reward"] for r in group) for group in groups])
        verdicts = [[r["reward"] >= chosen.pass_at for r in group] for group in groups]
        names[f"avg@{chosen.samples}"] = estimate([fmean(map(float, verdict)) for verdict in verdicts])
        for k in [2**i for i in range(1, chosen.samples.bit_length()) if 2**i <= chosen.samples]:
            whole = [(group, verdict) for group, verdict in zip(groups, verdicts, strict=True) if len(group) >= k]
            if whole:
                names[f"pass@{k}"] = estimate([pass_at(k, verdict) for _, verdict in whole])
                answers = [[answer_of(r["completion"]) for r in group] for group, _ in whole]
                votes = [majority_at(k, said, verdict) for said, (_, verdict) in zip(answers, whole, strict=True)]
                names[f"majority@{k}"] = estimate(votes)
    names["unscored"] = sum(r["reward"] is None for r in rows)
    names["truncated"] = fmean(float(not r["stopped"]) for r in rows)
    names["mean length"] = fmean(r["length"] for r in rows)
    return names


def answer_of(text: str) -> str | None:
    """The answer that a completion votes for: its last one in tags, in a box, or else its last number."""
    number = last_number(text)
    return last_tagged(text) or last_boxed(text) or (None if number is None else str(number))


def shown(value: Any) -> str:
    """A figure as the table has it."""
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


def row(sample: Sample, greedy: bool) -> dict[str, Any]:
    """A completion as a line of JSON."""
    return {
        "index": sample.prompt.index,
        "greedy": greedy,
        "prompt": sample.prompt.text,
        "completion": sample.text,
        "reward": sample.reward,
        "rewards": sample.rewards,
        "length": len(sample.completion_ids),
        "stopped": sample.stopped,
    }


def write(path: Path, results: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The figures, and the completions beside them."""
    from nanorlhf.scripts.statistics import Estimate

    plain = {k: dataclasses.asdict(v) if isinstance(v, Estimate) else v for k, v in results.items()}
    lines = beside(path, ".samples.jsonl")
    write_whole(lines, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    write_whole(path, json.dumps(plain, indent=1) + "\n")
    print(f"written to {path} and {lines}")


if __name__ == "__main__":
    sys.exit(main())
