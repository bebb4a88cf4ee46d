"""Every command of the documentation is read by the parser that it would meet, without being carried out."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nanorlhf import __main__
from nanorlhf.cli import parse
from nanorlhf.config.names import run_of
from nanorlhf.scripts import compare, evaluate
from tests.docs.pages import DOCS, ROOT, Block, blocks, commands

OURS = {*__main__.ALGORITHMS, *__main__.SCRIPTS}


class ParsedError(Exception):
    """A parser has taken its words, and what follows is not wanted."""


def only_parsed(main: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls a command that has an argparse parser up to the point where that is content."""
    read = argparse.ArgumentParser.parse_args

    def then_ends(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        read(self, *args, **options)
        raise ParsedError

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", then_ends)
        with pytest.raises(ParsedError):
            main(words)


def of_algorithm(name: str, words: list[str]) -> None:
    """The options of a training command."""
    if "--resume" in words:  # a run of that name is there
        run = run_of(words[words.index("--resume") + 1])
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text("{}\n")
    package = import_module(f"nanorlhf.{name}")
    config_class = getattr(package, next(found for found in package.__all__ if found.endswith("Config")))
    parse(config_class, name, ROOT / name / "recipes", words)


def of_ours(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of `nanorlhf`."""
    if "--help" in (name, *words):
        with pytest.raises(SystemExit, match="0"):
            raise SystemExit(__main__.main([name, *words]))
    elif name in __main__.ALGORITHMS:
        of_algorithm(name, words)
    elif name == "compare":
        monkeypatch.setattr(compare, "run_all", lambda jobs, output: 0)
        monkeypatch.setattr(compare, "publish_finished", lambda jobs, output: "")
        assert compare.main(words) == 0
    elif name == "evaluate":
        monkeypatch.setattr(evaluate, "about", lambda subject: ({}, {}))
        monkeypatch.chdir(ROOT)
        assert evaluate.main([*words, "--print_config"]) == 0
    else:
        assert name in __main__.SCRIPTS
        only_parsed(import_module(f"nanorlhf.scripts.{name}").main, words, monkeypatch)


def of_module(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` something in the checkout."""
    short = name.removeprefix("nanorlhf.").removeprefix("scripts.")
    if short in OURS:
        of_ours(short, words, monkeypatch)
        return
    assert name.startswith(("evidence", "docs.")), f"{name} is no module of ours"
    spec = find_spec(name)
    assert spec and spec.origin
    if words:
        assert "ArgumentParser" in Path(spec.origin).read_text(), f"{name} takes no words"
        only_parsed(import_module(name).main, words, monkeypatch)


def of_launcher(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch`, and what it launches."""
    from accelerate.commands.launch import launch_command_parser

    said = launch_command_parser().parse_args(words)
    assert said.module and said.training_script == "nanorlhf"
    name, *rest = said.training_script_args
    of_ours(name, rest, monkeypatch)


def of_make(words: list[str]) -> None:
    """Targets, and variables that the Makefile reads."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        target, assigned, _ = word.partition("=")
        assert f"$({target})" in makefile if assigned else re.search(rf"^{target}:", makefile, re.MULTILINE), word


def tried(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads one line; fails if nobody here knows how."""
    match [words[0].removeprefix(".venv/bin/"), *words[1:]]:
        case ["nanorlhf", name, *rest]:
            of_ours(name, rest, monkeypatch)
        case ["python" | "python3", "-m", name, *rest]:
            of_module(name, rest, monkeypatch)
        case ["python" | "python3", "scripts/install.py", *extras]:
            of_ours("install", extras, monkeypatch)
        case ["accelerate", "launch", *rest]:
            of_launcher(rest, monkeypatch)
        case ["make", *rest]:
            of_make(rest)
        case ["source", ".venv/bin/activate"]:
            pass
        case ["wc", "-l", *files]:
            assert files and all((ROOT / name).is_file() for name in files)
        case _:
            pytest.fail(f"no test knows how to try: {shlex.join(words)}")


def can_be_read(words: list[str]) -> bool:
    """Whether a line is one of ours, which its parser can read wherever it would run."""
    return words[0].removeprefix(".venv/bin/") in ("nanorlhf", "accelerate", "make")


SHELL = [(page, block) for page in DOCS for block in blocks(page) if block.is_shell]


@pytest.mark.parametrize(("page", "block"), SHELL, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(SHELL)])
def test_commands_are_understood(page: Path, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for other in (*blocks(ROOT / "docs" / "rewards.md"), *blocks(page)):
        if other.name:
            Path(other.name).write_text(other.text)
    for words in commands(block):
        if not block.needs or can_be_read(words):
            tried(words, monkeypatch)


def test_a_wrong_option_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in (
        "nanorlhf grpo --recipe tiny --kl_ceof 1",
        "make trian",
        "python -m evidence.speed.benchmark --olny x",
    ):
        with pytest.raises((ValueError, AssertionError, SystemExit)):
            tried(shlex.split(line), monkeypatch)


@pytest.mark.parametrize("page", DOCS[1:], ids=lambda page: page.stem)
def test_every_block_says_what_it_is_and_why_it_is_not_run(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("sh", "python", "yaml", "text"), f"a block without a language:\n{block.text}"
        assert not block.needs or block.needs.startswith("needs "), block.needs
    assert page.read_text().count("<!-- not run") == sum(bool(block.needs) for block in blocks(page)), "a mark is alone"


@pytest.mark.parametrize("page", DOCS[1:], ids=lambda page: page.stem)
def test_a_page_opens_with_a_command(page: Path) -> None:
    """Not those of results, which open with what they are about."""
    if page.stem not in ("gpu", "records", "real_model"):
        before = page.read_text().partition("```sh\n")[0]
        assert len(before.split()) < 60, "a page opens with a command that works"
