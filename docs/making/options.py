"""Writes docs/options.md: every option of every command, from the code.

python -m docs.making.options
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from nanorlhf.__main__ import ALGORITHMS
from nanorlhf.config.option import defaults, kinds_of
from nanorlhf.scripts.evaluate import EvaluateConfig

PAGE = Path(__file__).parents[1] / "options.md"
HEAD = """# All options

```sh
nanorlhf grpo --help all
nanorlhf grpo --recipe tiny --print_config
```

The first prints every option of one command; without `all`, those that people set first. The second prints what a
command line comes to. This page is made from the code by `python -m docs.making.options`.

An option goes on the command line (`--kl_coef 0.04`), into a recipe (`kl_coef: 0.04`) and into a config in Python
(`kl_coef=0.04`). Wrong names and values are refused before a model loads. [Names from other trainers](moving.md#names)
are understood.

Lists go with commas or brackets: `--reward_weights 1,0.1`. Names with values go as YAML:
`--columns '{answer: solution}'`. A switch alone means true: `--streaming`. `null` means nothing.

## Of every training command

Beside these, a training command takes `--recipe`, `--print_config` and `--plan`, which prints
[the memory plan](memory.md).
"""


@dataclasses.dataclass(frozen=True)
class Option:
    """An option as one command has it."""

    name: str
    group: str
    default: str
    takes: str
    about: str


def config_of(command: str) -> type[Any]:
    """The dataclass of a command's options."""
    package = import_module(f"nanorlhf.{command}")
    return getattr(package, next(name for name in package.__all__ if name.endswith("Config")))


def options_of(config_class: type[Any]) -> list[Option]:
    """Every option of a dataclass."""
    hints, standard = get_type_hints(config_class), defaults(config_class)
    found: list[Option] = []
    for f in dataclasses.fields(config_class):
        value, bounds = standard[f.name], str(f.metadata["bounds"])
        default = "" if value in (None, "", [], {}) else str(value).lower() if isinstance(value, bool) else f"{value}"
        takes = "; ".join([kinds_of(hints[f.name]), *([bounds] if bounds else [])])
        found.append(Option(f.name, f.metadata["group"], default, takes, f.metadata["help"]))
    return found


def page() -> str:
    """The page: what all have, what most have, and what each command has of its own."""
    named: dict[str, dict[str, Option]] = defaultdict(dict)  # by name, then by command
    for command in ALGORITHMS:
        for one in options_of(config_of(command)):
            named[one.name][command] = one
    sections: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, held in named.items():
        sections[tuple(held)].append(name)
    parts = [HEAD]
    for group in dict.fromkeys(next(iter(named[name].values())).group for name in sections[ALGORITHMS]):
        own = [named[name] for name in sections[ALGORITHMS] if next(iter(named[name].values())).group == group]
        parts += [f"### {group.capitalize()}\n", table(own)]
    some = [commands for commands in sections if commands != ALGORITHMS]
    for commands in sorted(some, key=lambda commands: (-len(commands), [*map(ALGORITHMS.index, commands)])):
        parts += [f"## Of {listed(commands)}\n", table([named[name] for name in sections[commands]])]
    own = [{"evaluate": one} for one in options_of(EvaluateConfig) if one.name not in named]
    text = "`nanorlhf evaluate` takes those options above that say what the task is, and these:\n"
    return "\n".join([*parts, "## Of evaluate\n", text, table(own)])


def listed(commands: tuple[str, ...]) -> str:
    """Commands in a heading."""
    *most, last = commands
    return f"{', '.join(most)} and {last}" if most else last


def table(options: list[dict[str, Option]]) -> str:
    """A table of options, each as every command that has it has it."""
    return "\n".join(["| option | default | takes | |", "|---|---|---|---|", *map(row, options), ""])


def row(held: dict[str, Option]) -> str:
    """An option: as most commands have it, with the defaults of the others."""
    usual = Counter(one.default for one in held.values()).most_common(1)[0][0]
    shown = next(one for one in held.values() if one.default == usual)
    others: dict[str, list[str]] = defaultdict(list)
    for command, one in held.items():
        if one.default != usual:
            others[one.default].append(command)
    default = "; ".join([code(usual), *(f"{', '.join(who)}: {code(value)}" for value, who in others.items())])
    cells = [f"`{shown.name}`", default, shown.takes, shown.about.replace("<", "&lt;")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def code(text: str) -> str:
    """A default, if there is one."""
    return f"`{text}`" if text else "none"


def main() -> int:
    """Writes the page."""
    PAGE.write_text(page())
    print(f"written to {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
