"""The site is built without a warning, can be searched, and asks nothing of the network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "WARNING" not in ended.stderr, ended.stderr
    return folder


def test_search_finds_options_and_errors(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {
        word: {entry["location"].partition("#")[0] for entry in index["docs"] if word in entry["title"] + entry["text"]}
        for word in ("kl_coef", "kl_runaway", "torchcodec", "scale_rewards")
    }
    assert {"options.html", "moving.html", "trouble.html"} <= found["kl_coef"]
    assert "trouble.html" in found["kl_runaway"] and "install.html" in found["torchcodec"]
    assert "grpo/index.html" in found["scale_rewards"], "the algorithms' own pages are part of it"


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?(https?:[^"'\s>]*)""")
    for page in site.rglob("*.html"):
        assert fetched.findall(page.read_text()) == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?https?:", sheet.read_text()), sheet


def test_links_between_pages_and_pictures_are_there(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name != "404.html":  # whose links begin at the root of wherever the site lies
            for link in re.findall(r"""(?:src|href)=["']?([^"'\s>#]+)""", page.read_text()):
                assert ":" in link or (page.parent / link).exists(), f"{page.relative_to(site)}: {link}"
