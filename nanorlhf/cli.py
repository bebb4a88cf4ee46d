"""The command line: recipes below, options on top, mistakes in one line."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, get_loader

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.config.aliases import ALIASES, rename
from nanorlhf.config.names import run_of
from nanorlhf.config.option import defaults, item_type, kinds_of, of_type, placeholder
from nanorlhf.config.task import TaskConfig
from nanorlhf.errors import RunError, UsageError, error_line, nearest
from nanorlhf.records.directory import algorithm_of
from nanorlhf.system.signals import heed
from nanorlhf.system.terminal import log, signature, speaks
from nanorlhf.system.versions import installed

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
    if {"-h", "--help"} & set(argv):
        print(build_parser(config_class, name, recipes, every="all" in argv).format_help(), end="")
        raise SystemExit(0)
    if "--version" in argv:
        print(f"nanorlhf {installed()}")
        raise SystemExit(0)
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
    layers = [read_options(path, config_class) for path in files]
    options = defaults(config_class) | dict(below or {})
    for layer in [*layers, given]:
        options |= rename({k: v for k, v in layer.items() if k not in ("recipe", "print_config", "plan")}, options)
    return wanted, config_class(**options)


def read_options(path: Path, config_class: type[TaskConfig]) -> dict[str, Any]:
    """The options in a recipe, or of an earlier run: texts stay as they are written, whatever they look like."""
    try:
        given = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {error_line(error)}") from None
    if not isinstance(given, dict):
        raise UsageError(f"{path} holds no options, which are names with values")
    hints = get_type_hints(config_class)
    for name, value in given.items():
        if name not in hints.keys() | ALIASES.keys():
            raise UsageError(f"{path}: unknown option {name!r}: {nearest(str(name), hints)}")
        if isinstance(value, bool) and "on" in get_args(hints.get(name)):  # YAML takes these words for true and false
            given[name] = "on" if value else "off"
        try:
            of_type(name, given[name], hints.get(name, Any))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return given


read_yaml = get_loader("yaml")  # which takes 1e-5 for a number


def word_reader(hint: Any) -> Any:
    """The type of an option's words for argparse: a reader where the parser's own would take a text for YAML."""
    if hint == str | None:
        return lambda word: None if word == "null" else word
    if hint == str | list[str]:
        return lambda word: read_word(word) if str(word).startswith("[") else word
    if get_origin(hint) is dict:
        return read_word
    return hint | str if item_type(hint) else hint


def read_word(word: Any) -> Any:
    """A list or a mapping that YAML reads in a word; another word stays as it is, and so does what was read before."""
    try:
        found = read_yaml(word) if isinstance(word, str) else word
    except yaml.YAMLError:
        return word
    return found if isinstance(found, list | dict) else word


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


class HelpLines(argparse.HelpFormatter):
    """Help no wider than a page, with each option's text beside it, or below a long name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(110, shutil.get_terminal_size().columns - 2))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return re.sub(r", --\w+\+ .*", "", super()._format_action_invocation(action))  # a list's other form


def build_parser(config_class: type[C], name: str, recipes: Path, *, every: bool = True) -> ArgumentParser:
    """Every field of the dataclass as an option, in its group; other trainers' names are taken too, unlisted.

    Help lists those that are set first, or `every` one.
    """
    hints = get_type_hints(config_class)
    trains = "max_steps" in hints
    parser = ArgumentParser(
        prog=f"nanorlhf {name}",
        usage=f"%(prog)s {'' if trains else 'MODEL '}[--recipe NAME] [--OPTION VALUE ...]",
        description=config_class.__doc__,
        epilog=None if every else f"`nanorlhf {name} --help all` lists all {len(hints)} options.",
        formatter_class=HelpLines,
        add_help=False,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    shipped = ", ".join(sorted(path.stem for path in recipes.glob("*.yaml"))) + " or " if trains else ""
    start = parser.add_argument_group("start")
    about = f"Options from a recipe: {shipped}a YAML file; several with commas."
    start.add_argument("--recipe", type=str, metavar="NAME", help=about)
    start.add_argument("--print_config", action="store_true", help="Print the resolved configuration and stop.")
    if trains:
        start.add_argument("--plan", action="store_true", help="Print the memory plan (--gpu_memory_gib) and stop.")
    start.add_argument("--version", action="version", version="", help="Print what is installed and stop.")
    start.add_argument("--help", "-h", action="help", help="Print this and stop; --help all: with every option.")
    add_options(parser, config_class, hints, every)
    for alias in ALIASES.keys() - hints.keys():
        parser.add_argument(f"--{alias}", type=Any, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def add_options(parser: ArgumentParser, config_class: type[C], hints: Mapping[str, Any], every: bool) -> None:
    """Adds each field of the dataclass under the heading of its group."""
    fields, standard = dataclasses.fields(config_class), defaults(config_class)
    sections = sorted(dict.fromkeys(f.metadata["group"] for f in fields), key="run".__eq__)  # which comes last
    groups = {section: parser.add_argument_group(section) for section in sections}
    for f in fields:
        shown = "none" if standard[f.name] in (None, "", [], {}) else standard[f.name]
        switch: dict[str, Any] = {"nargs": "?", "const": True} if hints[f.name] is bool else {}
        text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
        groups[f.metadata["group"]].add_argument(
            f"--{f.name}",
            type=word_reader(hints[f.name]),
            default=argparse.SUPPRESS,
            metavar=placeholder(hints[f.name]),
            help=text if every or f.metadata["first"] else argparse.SUPPRESS,
            **switch,
        )


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
