"""Writes the model of a run or a checkpoint as one whole, its adapter merged, for transformers and `vllm serve`.

    python -m nanorlhf.scripts.merge runs/mine merged/mine

With it go the tokenizer and a model card that says how it was made and what came of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.config.names import run_of, shipped_model
from nanorlhf.config.option import defaults
from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError
from nanorlhf.records.directory import RunRecord, read_run
from nanorlhf.scripts.evaluate import about

DTYPES = ("float32", "bfloat16", "float16")
# Options that a card has whether they are the usual ones or not.
USED = ("model_name_or_path", "dataset_name", "reward_funcs", "prompts_per_step", "num_generations", "max_steps")
USED += ("learning_rate", "kl_coef", "temperature", "max_completion_length", "lora", "lora_r", "lora_alpha", "seed")
SHOWN = ("eval/reward", "eval/accuracy", "eval/loss", "reward/mean", "kl", "entropy", "completion/length_mean")


def main(argv: list[str] | None = None) -> int:
    """Gives 0 if it was written, 2 if that cannot be."""
    parser = argparse.ArgumentParser(
        prog="nanorlhf merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run directory, or one of its checkpoints")
    parser.add_argument("output", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of the base model's files)")
    args = parser.parse_args(argv)
    try:
        print(f"merged into {merge(args.run, args.output, args.dtype)}")
    except UsageError as error:
        print(f"merge: error: {error}", file=sys.stderr)
        return 2
    return 0


def merge(run: str, output: Path, dtype: str | None = None) -> Path:
    """The folder, written."""
    import torch  # here, and what imports it, so that --help is quick
    import transformers

    from nanorlhf.assembly import load_tokenizer
    from nanorlhf.policy.policy import Policy
    from nanorlhf.records import checkpoint
    from nanorlhf.system.files import whole_folder

    transformers.utils.logging.disable_progress_bar()
    task, model = about(run)
    if not task:
        raise UsageError(f"{run!r} is neither a run directory nor a checkpoint in one: there is no config.yaml")
    folder = Path(next(iter(model.values())))
    if damage := checkpoint.damaged(folder):
        raise UsageError(f"the checkpoint {folder} is damaged ({damage}); name another")
    names = {name: task[name] for name in ("model_name_or_path", "trust_remote_code")} | model
    if not names["model_name_or_path"]:
        raise UsageError(f"{run!r} began with a model made in Python: merge {folder} there, by PEFT's merge_and_unload")
    check_output(output)
    adapter = "adapter_name_or_path" in names
    config = TrainConfig(**names, device="cpu", dtype="float32", lora="all-linear" if adapter else "none")
    policy = Policy(config)  # in float32, in which nothing is rounded away before the sum
    merged: Any = policy.serving_copy("merged")
    saved = transformers.AutoConfig.from_pretrained(
        shipped_model(config.model_name_or_path), trust_remote_code=config.trust_remote_code
    )
    kind = getattr(torch, dtype) if dtype else saved.dtype or torch.float32
    with whole_folder(output) as draft:
        merged.to(kind).save_pretrained(str(draft))
        load_tokenizer(config, None).save_pretrained(str(draft))
        text = card(read_run(run_of(str(folder))), checkpoint.step_of(folder))
        (draft / "README.md").write_text(text, encoding="utf-8")
    return output


def check_output(output: Path) -> None:
    """That a folder can be made there, before anything is loaded for it."""
    if output.exists():
        raise UsageError(f"{str(output)!r} exists; choose another folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=output.parent).cleanup()
    except OSError as error:
        raise UsageError(f"{str(output)!r} cannot be written: {error.strerror}") from None


def standard_of(record: RunRecord) -> dict[str, Any]:
    """The options of a run's algorithm if nothing is said; of a user's own, those of the one that it is like."""
    for name in [record.algorithm, *ALGORITHMS]:
        if name in ALGORITHMS:
            package = import_module(f"nanorlhf.{name}")
            options = defaults(getattr(package, next(found for found in package.__all__ if found.endswith("Config"))))
            if record.options.keys() <= options.keys():
                return options
    return {}


def card(record: RunRecord, step: int) -> str:
    """A model card: the recipe, and the first figures and those after this step."""
    standard, left_out = standard_of(record), ("output_dir", "resume", "overwrite_output_dir", "run_name")
    unlike = {k: v for k, v in record.options.items() if k not in standard or v != standard[k]}
    said = {k: v for k, v in record.options.items() if (k in unlike or k in USED) and k not in left_out}
    rows = [row for row in record.rows if row["step"] <= step]
    lines = []
    for name in SHOWN:
        found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if found:
            (first, before), (last, after) = found[0], found[-1]
            lines.append(f"| {name} | {before:.4g} (step {first}) | {after:.4g} (step {last}) |")
    base = record.options["model_name_or_path"]
    head = {"library_name": "transformers", "tags": ["nanorlhf", record.algorithm]}
    head |= {} if base.startswith("nanorlhf:") or Path(base).exists() else {"base_model": base}
    table = "\n".join(["| | first | last |", "|---|---|---|", *lines])
    return (
        f"---\n{yaml.safe_dump(head)}---\n# {record.name}\n\n"
        f"{base}, trained by `python -m {record.algorithm}` of nanorlhf for {step} steps; "
        "what it learned is merged into the weights.\n\n"
        f"## Results\n\n{table}\n\n## Recipe\n\n```yaml\n{yaml.safe_dump(said, sort_keys=False)}```\n"
    )


if __name__ == "__main__":
    sys.exit(main())
