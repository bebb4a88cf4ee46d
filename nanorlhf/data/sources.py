"""Sources of rows: the hub, files and folders, what is built in, and functions of the user's own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.exceptions import DatasetGenerationError

from nanorlhf.errors import UsageError, nearest
from nanorlhf.system.user_code import from_file, is_file_spec
from nanorlhf.tasks.arithmetic import arithmetic, digits
from nanorlhf.tasks.calculator import problems
from nanorlhf.tasks.counting import counting
from nanorlhf.tasks.grade_school import gsm_symbolic
from nanorlhf.tasks.stories import stories

Rows = datasets.Dataset | datasets.IterableDataset

BUILT_IN = {
    "arithmetic": arithmetic,
    "counting": counting,
    "digits": digits,
    "gsm_symbolic": gsm_symbolic,
    "stories": stories,
    "calculator": lambda split: from_rows(problems(split)),
}
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load(name: str, config: str | None, split: str, streaming: bool = False) -> Rows:
    """The rows of one split of a dataset."""
    try:
        rows = find(name, config, split, streaming)
    except UsageError:
        raise
    except Exception as error:  # datasets raises dozens of types, all of them "cannot load this"
        raise UsageError(f"dataset_name={name!r}, split {split!r}, cannot be loaded: {reason(error)}") from error
    if isinstance(rows, datasets.Dataset) and len(rows) == 0:
        raise UsageError(f"dataset_name={name!r}, split {split!r}, has no rows")
    return rows


def find(name: str, config: str | None, split: str, streaming: bool) -> Rows:
    """The rows by the kind of name; what is not from `datasets.load_dataset` is cut here."""
    path, whole = Path(name), split.partition("[")[0]
    kind, _, rest = name.partition(":")
    if name in BUILT_IN:
        return part(BUILT_IN[name](whole), split)
    if kind == "reasoning_gym":
        from nanorlhf.tasks.reasoning_gym import reasoning_gym_dataset

        return part(reasoning_gym_dataset(rest, config, whole), split)
    if is_file_spec(name) or FUNCTION.fullmatch(name):
        return part(made(name, function(name), whole, streaming), split)
    if path.suffix in READERS:
        if not path.is_file():
            raise UsageError(f"dataset_name={name!r}: there is no such file")
        if not path.stat().st_size:
            raise UsageError(f"dataset_name={name!r}: the file is empty")
        return loaded(READERS[path.suffix], None, split, streaming, data_files=name)
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return part(of_split(datasets.load_from_disk(name), whole), split)
    return loaded(name, config, split, streaming)


def loaded(name: str, config: str | None, split: str, streaming: bool, **more: Any) -> Rows:
    """Rows that `datasets` itself can load."""
    if streaming and "[" in split:
        raise UsageError(f"split {split!r}: a stream has no parts; leave streaming or the part away")
    return cast(Rows, datasets.load_dataset(name, config, split=split, streaming=streaming, **more))


def of_split(found: Any, split: str) -> Rows:
    """The split of a dictionary of datasets; a dataset is the only split there is."""
    if not isinstance(found, datasets.DatasetDict | datasets.IterableDatasetDict):
        return found
    if split not in found:
        raise UsageError(
            f"split {split!r}: there are {', '.join(map(str, found))}; {nearest(split, map(str, found), listed=True)}"
        )
    return found[split]


def part(rows: Rows, split: str) -> Rows:
    """The part of the rows that a split such as train[:500] or train[10%:20%] asks for."""
    if "[" not in split:
        return rows
    if not isinstance(rows, datasets.Dataset):
        raise UsageError(f"split {split!r}: a stream has no parts; leave streaming or the part away")
    asked = datasets.ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: len(rows)})
    return rows.select([i for piece in asked for i in range(piece.from_ or 0, piece.to or 0)])


def function(spec: str) -> Callable[[str], Any]:
    """The function that `path/to/file.py:name` or `package.module:name` names."""
    if is_file_spec(spec):
        found = from_file(spec)
    else:
        where, _, name = spec.partition(":")
        try:
            module = importlib.import_module(where)
        except Exception as error:
            raise UsageError(f"dataset_name={spec!r}: {where} cannot be imported: {reason(error)}") from error
        if not hasattr(module, name):
            raise UsageError(f"dataset_name={spec!r}: {where} has no {name!r}; {nearest(name, vars(module))}")
        found = getattr(module, name)
    if not callable(found):
        raise UsageError(f"dataset_name={spec!r} must name a function, which is given the split")
    return found


def made(spec: str, make: Callable[[str], Any], split: str, streaming: bool) -> Rows:
    """The rows that a user's function makes of a split."""
    try:
        found = make(split)
        if isinstance(found, Mapping):
            return of_split(found, split)
        if isinstance(found, datasets.Dataset | datasets.IterableDataset):
            return found
        if streaming:
            return datasets.IterableDataset.from_generator(lambda: iter(make(split)))
        return from_rows(found)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"dataset_name={spec!r} failed on split {split!r}: {reason(error)}") from error


def from_rows(rows: Iterable[Any]) -> datasets.Dataset:
    """A dataset of rows, each a mapping from columns to values."""
    listed = list(rows)
    odd = next((row for row in listed if not isinstance(row, Mapping)), None)
    if odd is not None:
        raise UsageError(f"a row maps columns to values, and this one does not: {odd!r:.200}")
    if not listed:
        raise UsageError("there are no rows")
    try:
        return datasets.Dataset.from_list(listed)
    except Exception as error:
        raise UsageError(
            f"the rows make no table, a column of which holds one kind of values: {reason(error)}"
        ) from error


def as_rows(given: Any) -> Rows:
    """A dataset as it is, a list of rows as a dataset."""
    if isinstance(given, datasets.Dataset | datasets.IterableDataset):
        return given
    if isinstance(given, list | tuple):
        return from_rows(given)
    splits = f", one of {', '.join(map(str, given))}" if isinstance(given, Mapping) else ""
    raise UsageError(
        f"a dataset is a Dataset{splits}, an IterableDataset or a list of rows; not {type(given).__name__}"
    )


def only_split(name: str) -> str | None:
    """The split of a file, which has but one."""
    return "train" if Path(name).suffix in READERS else None


def reason(error: BaseException) -> str:
    """The error in one line; `datasets` hides it one level down."""
    inner = error.__cause__ if isinstance(error, DatasetGenerationError) else None
    inner = inner or error
    return " ".join(f"{type(inner).__name__}: {inner}".split())
