"""The log: who prints it, who may silence it, and which process speaks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nanorlhf.system.terminal import EACH, LAUNCHED, log

USE = "import logging\nfrom nanorlhf.system.terminal import log\n"
SPEAK = "log.info('a\\x1b[2Jline')\nlog.warning('beware')\n"
SET_UP = "logging.basicConfig(format='%(levelname)s %(message)s')\n"


def printed(code: str) -> tuple[str, str]:
    """Standard output and standard error of a program of the user's."""
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=alone)
    return ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("code", "out", "error"),
    [
        (USE + SPEAK, "a\\x1b[2Jline\nbeware\n", ""),
        (USE + "log.setLevel('WARNING')\n" + SPEAK, "beware\n", ""),
        ("import logging; logging.getLogger('nanorlhf').setLevel('ERROR')\n" + USE + SPEAK, "", ""),
        (USE + SET_UP + SPEAK, "", "INFO a\x1b[2Jline\nWARNING beware\n"),
        (USE + SPEAK + SET_UP + "log.info('later')\n", "a\\x1b[2Jline\nbeware\nlater\n", ""),
    ],
    ids=["alone", "warnings", "silent", "set-up-before", "set-up-later"],
)
def test_a_line_is_printed_once_by_whoever_was_chosen(code: str, out: str, error: str) -> None:
    assert printed(code) == (out, error)


@pytest.mark.parametrize(("rank", "said"), [("0", "a line\nits own (process 0)\n"), ("1", "its own (process 1)\n")])
def test_the_first_process_speaks_for_all(
    rank: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    log.info("a line")
    log.warning("its own", extra=EACH)
    assert capsys.readouterr().out == said
