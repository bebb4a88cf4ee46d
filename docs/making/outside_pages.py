"""Lets the site hold the repository's other pages too: those of algorithms, rewards and rules, and what they link to.

MkDocs calls these functions. In the repository a page of docs/ links to ../grpo/, which GitHub shows; on the site the
same page lies at grpo/, so links are written anew.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from nanorlhf.__main__ import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = [*(f"{name}/README.md" for name in (*ALGORITHMS, "rewards")), "CONTRIBUTING.md", "SECURITY.md"]
LINK = re.compile(r"(!?\[[^\]]*\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the pages outside docs/, and every file that a page shows or links to."""
    added = set(OUTSIDE)
    for path in [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in OUTSIDE)]:
        for link in LINK.finditer(path.read_text()):
            target = linked(path, link[2])
            if not target.is_relative_to(ROOT / "docs"):
                added.add(str(target.relative_to(ROOT)))
    for name in sorted(added):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links of the repository into links of the site."""
    source = Path(page.file.abs_src_path)
    here = posixpath.dirname(page.file.src_uri)

    def anew(link: re.Match[str]) -> str:
        target = linked(source, link[2])
        inside = target.is_relative_to(ROOT / "docs")
        there = target.relative_to(ROOT / "docs" if inside else ROOT).as_posix()
        return f"{link[1]}{posixpath.relpath(there, here or '.')}{link[3] or ''}{link[4]}"

    return LINK.sub(anew, markdown)


def linked(page: Path, target: str) -> Path:
    """The file that a link of a page means, of a folder its README."""
    path = (page.parent / target).resolve()
    return path / "README.md" if path.is_dir() else path
