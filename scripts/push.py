"""Puts the model of a run or a checkpoint on the Hugging Face hub: its adapter, or with --merged the whole model.

    nanorlhf push runs/mine user/name
    nanorlhf push runs/mine user/name --merged

With it go the tokenizer and a model card: recipe, learning curve and results. Log in first: `hf auth login`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanorlhf.config.names import latest, run_of
from nanorlhf.errors import RunError, UsageError, first_line
from nanorlhf.records.directory import read_run
from nanorlhf.scripts import model_card
from nanorlhf.scripts.merge import DTYPES, merge, saved_by


def main(argv: list[str] | None = None) -> int:
    """Gives 0 if the hub has it, 1 if the hub cannot be reached or refuses, 2 if there is nothing to put there."""
    parser = argparse.ArgumentParser(
        prog="nanorlhf push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run directory, or one of its checkpoints")
    parser.add_argument("repository", help="on the hub, as user/name; it is made if there is none")
    parser.add_argument("--merged", action="store_true", help="the whole model, the adapter merged into its weights")
    parser.add_argument("--dtype", choices=DTYPES, help="of merged weights (default: that of the base model's files)")
    parser.add_argument("--base", help="the base model's name on the hub, if the run had it in a folder")
    parser.add_argument("--private", action="store_true", help="nobody else sees a repository that is made")
    args = parser.parse_args(argv)
    try:
        where = push(args.run, args.repository, args.merged, args.dtype, args.base, args.private)
    except (UsageError, RunError) as error:
        print(f"push: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"pushed to {where}")
    return 0


def push(
    run: str,
    repository: str,
    merged: bool = False,
    dtype: str | None = None,
    base: str | None = None,
    private: bool = False,
) -> str:
    """The address at which the hub has it now."""
    from huggingface_hub import HfApi  # here, and what imports torch, so that --help is quick
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from nanorlhf.records import checkpoint

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"the hub has no such names as {repository!r}: {first_line(error)}") from None
    task, model, folder = saved_by(run)
    record, step = read_run(run_of(str(folder))), checkpoint.step_of(folder)
    adapter, judge = "adapter_name_or_path" in model and not merged, record.algorithm == "reward_model"
    if dtype and (adapter or judge):
        raise UsageError(f"dtype={dtype!r} is for weights that are merged now: --merged, and no reward model")
    base = base or base_of(folder, task["model_name_or_path"], adapter)
    client = HfApi()
    with reached(repository):
        user = client.whoami()["name"]
    saved = model_card.Saved(record, step, adapter, repository if "/" in repository else f"{user}/{repository}", base)
    with tempfile.TemporaryDirectory() as parent:
        draft = Path(parent) / "model"
        if adapter or judge:
            copy_adapter(folder, draft, base) if adapter else copy_classifier(folder, draft)
            model_card.write(saved, draft)
        else:
            merge(str(folder), draft, dtype, saved.where, base)
        said = f"{record.name}, step {step}, by nanorlhf"
        with reached(repository):
            made = client.create_repo(saved.where, private=private or None, exist_ok=True)
            client.upload_folder(repo_id=saved.where, folder_path=draft, commit_message=said)
    return str(made)


@contextmanager
def reached(repository: str) -> Iterator[None]:
    """Says in one line why the hub could not be reached, or what it refused."""
    try:
        yield
    except Exception as error:  # the hub's client raises dozens of types
        raise RunError(f"{repository!r} cannot be pushed: {first_line(error)}") from error


def base_of(folder: Path, named: str, adapter: bool) -> str | None:
    """The base's name on the hub, which others need for an adapter."""
    if not adapter:
        return model_card.hub_name(named)
    stated = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] or ""
    if base := model_card.hub_name(named) or model_card.hub_name(stated):
        return base
    raise UsageError(
        f"the adapter's base {named or stated or 'made in Python'!r} is on this machine only: push the whole model "
        "(--merged), or say by what name the hub has the base (--base)"
    )


def copy_adapter(folder: Path, draft: Path, base: str | None) -> None:
    """Writes a checkpoint's adapter and tokenizer without the trainer's state, for a base that others can load."""
    from nanorlhf.records.checkpoint import CHECKSUMS, STATE

    own = {CHECKSUMS, "README.md", f"{STATE}.json", f"{STATE}.safetensors"}
    draft.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name not in own:
            shutil.copy(path, draft)
    config = draft / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}, indent=2))


def copy_classifier(folder: Path, draft: Path) -> None:
    """Writes the whole reward model that a run leaves at its end."""
    run = run_of(str(folder))
    whole = run / "model"
    if not whole.is_dir() or folder != latest(run):
        raise UsageError(f"a whole reward model is there of a run's end only: push {run} once it has ended")
    shutil.copytree(whole, draft)


if __name__ == "__main__":
    sys.exit(main())
