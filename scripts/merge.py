"""Writes the model of a run or a checkpoint as one whole, its adapter merged, for transformers and `vllm serve`.

    python -m nanorlhf.scripts.merge runs/mine merged/mine

With it go the tokenizer and a model card that says how it was made and what came of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanorlhf.config.names import run_of, shipped_model
from nanorlhf.config.training import TrainConfig
from nanorlhf.errors import UsageError
from nanorlhf.records.directory import read_run
from nanorlhf.scripts import model_card
from nanorlhf.scripts.evaluate import about

DTYPES = ("float32", "bfloat16", "float16")


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


def merge(run: str, output: Path, dtype: str | None = None, where: str = "", base: str | None = None) -> Path:
    """Writes the folder; its card says to load it by `where` (or the folder's name), and that `base` was its base."""
    import torch  # here, and what imports it, so that --help is quick
    import transformers

    from nanorlhf.data.templates import read_tokenizer
    from nanorlhf.policy.policy import Policy
    from nanorlhf.records import checkpoint
    from nanorlhf.system.files import whole_folder

    transformers.utils.logging.disable_progress_bar()
    task, model, folder = saved_by(run)
    names = {name: task[name] for name in ("model_name_or_path", "trust_remote_code")} | model
    if not names["model_name_or_path"]:
        raise UsageError(f"{run!r} began with a model made in Python: merge {folder} there, by PEFT's merge_and_unload")
    check_output(output)
    adapter = "adapter_name_or_path" in names
    config = TrainConfig(**names, device="cpu", dtype="float32", lora="all-linear" if adapter else "none")
    policy = Policy(config)  # in float32, in which nothing is rounded away before the sum
    merged: Any = policy.serving_copy("merged")
    record, step = read_run(run_of(str(folder))), checkpoint.step_of(folder)
    began = record.options[
        "model_name_or_path"
    ]  # whose files have no float32 masters, as a checkpoint of all weights has
    kind = getattr(torch, dtype) if dtype else dtype_of_files([began, config.model_name_or_path], config)
    with whole_folder(output) as draft:
        merged.to(kind).save_pretrained(str(draft))
        read_tokenizer(str(folder), "run", config.trust_remote_code).save_pretrained(str(draft))  # with its template
        base = base or model_card.hub_name(record.options["model_name_or_path"])
        model_card.write(model_card.Saved(record, step, adapter=False, where=where or str(output), base=base), draft)
    return output


def dtype_of_files(models: Sequence[str | None], config: TrainConfig) -> Any:
    """That of the first model whose config can be read."""
    import torch
    import transformers

    for name in filter(None, models):
        with suppress(OSError, ValueError):
            about = transformers.AutoConfig.from_pretrained(
                shipped_model(name), trust_remote_code=config.trust_remote_code
            )
            return about.dtype or torch.float32
    return torch.float32


def saved_by(run: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """The options of a run's task, those that load its newest checkpoint, or the one named, and that one's folder."""
    from nanorlhf.records import checkpoint

    task, model = about(run)
    if not task:
        raise UsageError(f"{run!r} is neither a run directory nor a checkpoint in one: there is no config.yaml")
    folder = Path(next(iter(model.values())))
    if damage := checkpoint.damaged(folder):
        raise UsageError(f"the checkpoint {folder} is damaged ({damage}); name another")
    return task, model, folder


def check_output(output: Path) -> None:
    """That a folder can be made there, before anything is loaded for it."""
    if output.exists():
        raise UsageError(f"{str(output)!r} exists; choose another folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=output.parent).cleanup()
    except OSError as error:
        raise UsageError(f"{str(output)!r} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
