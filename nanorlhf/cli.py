"""The command line: recipes below, options on top, mistakes in one line."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.config.aliases import ALIASES, rename
from nanorlhf.config.names import run_of
from nanorlhf.config.option import defaults, item_type, kinds_of
from nanorlhf.config.task import TaskConfig
from nanorlhf.errors import RunError, UsageError, error_line, nearest
from nanorlhf.records.directory import algorithm_of
from nanorlhf.system.signals import heed
from nanorlhf.system.terminal import log, signature, speaks

C = TypeVar("C", bound=TaskConfig)
Shown = Literal["config", "plan", ""]


def run(name: str, argv: list[str] | None = None) -> int:
    """Parses, trains, and gives the exit status, as `nanorlhf.system.command` explains it."""
    package, running = importlib.import_module(f"nanorlhf.{name}"), False
    config_name = next(found for found in package.__all__ if found.endswith("Config"))
    config_class, trainer = getattr(package, config_name), config_name.replace("Config", "Trainer")
    try:
        recipes = Path(package.__path__[0]) / "recipes"
        shown, config = parse(config_class, name, recipes, sys.argv[1:] if argv is None else argv)
        if shown == "config":
            print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
            return 0
        if shown == "plan":
            print(getattr(package, trainer).plan_of(config).table())
            return 0
        model, dataset = config.model_name_or_path or "no model", config.dataset_name or "no dataset"
        log.info(f"nanorlhf {name}: {model} on {dataset}")
        trained = getattr(package, trainer)(args=config)  # torch is imported here
        running = True
        trained.train()
    except (UsageError, RunError) as error:
        heed()
        if running or speaks():  # as options are read, every process finds the same mistake
            print(f"nanorlhf {name}: error{signature() if running else ''}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def parse(
    config_class: type[C], name: str, recipes: Path, argv: list[str], below: Mapping[str, Any] | None = None
) -> tuple[Shown, C]:
    """Gives what is only to be printed, if anything, and the configuration: each layer overrides the one before."""
    parser = build_parser(config_class, name, recipes)
    argv = [re.sub(r"^--[\w-]+", lambda option: "--" + option[0][2:].replace("-", "_"), word) for word in argv]
    try:
        given = parser.parse_args(argv).as_dict()
        wanted = "plan" if given.pop("plan", False) else "config" if given.pop("print_config") else ""
        chosen = given.pop("recipe") or ""
        files = [recipe_path(recipe, recipes) for recipe in chosen.split(",") if recipe]
        if resume := str(given.get("resume") or given.get("resume_from_checkpoint") or ""):
            files.insert(0, saved_config(resume, name))
            given = {"output_dir": str(run_of(resume))} | given | {"overwrite_output_dir": False}
    except argparse.ArgumentError as error:
        raise UsageError(one_line(str(error), config_class)) from None
    layers = [read_options(path, parser, config_class) for path in files]
    options = defaults(config_class) | dict(below or {})
    for layer in [*layers, given]:
        options |= rename({k: v for k, v in layer.items() if k not in ("recipe", "print_config", "plan")}, options)
    return wanted, config_class(**options)


def read_options(path: Path, parser: ArgumentParser, config_class: type[TaskConfig]) -> dict[str, Any]:
    """The options in a recipe, or of an earlier run."""
    try:
        return parser.parse_path(str(path), defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise UsageError(f"{path}: {one_line(str(error), config_class)}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error_line(error)}") from None


def recipe_path(name: str, recipes: Path) -> Path:
    """The file behind a path to a recipe, or behind the name of one that is shipped."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        path = recipes / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise UsageError(f"unknown recipe {name!r}: {nearest(path.stem, (p.stem for p in recipes.glob('*.yaml')))}")
    return path


def saved_config(run: str, name: str) -> Path:
    """The options of a run that is to go on by the command `name`, whose run it must be."""
    path = run_of(run) / "config.yaml"
    if not path.is_file():
        raise UsageError(f"resume={run!r}: there is no run to continue ({path} does not exist)")
    whose = algorithm_of(run_of(run))
    if whose in ALGORITHMS and whose != name:
        raise UsageError(f"resume={run!r} is a run of {whose}: it goes on by nanorlhf {whose} --resume {run}")
    return path


def build_parser(config_class: type[TaskConfig], name: str, recipes: Path) -> ArgumentParser:
    """Every field of the dataclass as an option, in its group; other trainers' names are taken too, unlisted."""
    parser = ArgumentParser(
        prog=f"nanorlhf {name}",
        description=config_class.__doc__,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    listed = ", ".join(sorted(path.stem for path in recipes.glob("*.yaml")))
    parser.add_argument("--recipe", type=str, help=f"Where to start: {listed}, or a YAML file; several with commas.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration and stop.")
    hints, standard = get_type_hints(config_class), defaults(config_class)
    if "offload" in hints:
        parser.add_argument("--plan", action="store_true", help="Print the memory plan (--gpu_memory_gib) and stop.")
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(config_class):
        section = f.metadata["group"]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        shown = "none" if standard[f.name] in (None, "", [], {}) else standard[f.name]
        switch: dict[str, Any] = {"nargs": "?", "const": True} if hints[f.name] is bool else {}
        text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
        kind = hints[f.name] | str if item_type(hints[f.name]) else hints[f.name]
        groups[section].add_argument(f"--{f.name}", type=kind, default=argparse.SUPPRESS, help=text, **switch)
    for alias in ALIASES.keys() - hints.keys():
        parser.add_argument(f"--{alias}", type=Any, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def one_line(message: str, config_class: type[TaskConfig]) -> str:
    """The parser's complaint in one line, with the nearest option if one is unknown."""
    unknown = re.search(r"unrecognized arguments: -*([^\s=]+)|Option '([^']+)' is not accepted", message)
    if unknown:
        name = unknown[1] or unknown[2]
        return f"unknown option {name!r}: {nearest(name, [f.name for f in dataclasses.fields(config_class)])}"
    wrong, hints = (
        re.search(r'Parser key "(\w+)":.*(?:Got|Given) value: (\S.*)', message, re.DOTALL),
        get_type_hints(config_class),
    )
    if wrong and wrong[1] in hints:
        return f"{wrong[1]}={' '.join(wrong[2].split())!r} is of the wrong type: it takes {kinds_of(hints[wrong[1]])}"
    return " ".join(message.replace("Parser key ", "").split())
