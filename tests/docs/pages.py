"""The pages of the documentation, taken apart: fenced blocks with their marks, links, headings, prose."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from nanorlhf.__main__ import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # whose blocks and commands are tried
OTHERS = [*(ROOT / name / "README.md" for name in (*ALGORITHMS, "rewards")), ROOT / "CONTRIBUTING.md"]
OTHERS += [ROOT / "SECURITY.md"]
FENCE = re.compile(r"(?:^<!-- not run: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("make", "nanorlhf", "python", "python3", ".venv/bin/python", ".venv/bin/nanorlhf", "accelerate", "source")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    needs: str  # why no test runs it, or nothing

    @property
    def name(self) -> str | None:
        """The file that its first line says it is."""
        found = re.match(r"# (\S+\.(?:py|yaml))\n", self.text)
        return found[1] if found else None

    @property
    def is_shell(self) -> bool:
        """Whether it holds commands; a block without a language does if it begins with one."""
        return self.language == "sh" or (not self.language and self.text.split()[0] in PROGRAMS)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    return [Block(language, text, needs) for needs, language, text in FENCE.findall(page.read_text())]


def commands(block: Block) -> list[list[str]]:
    """The words of each line of a shell block, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_code(text: str) -> str:
    """A page without fenced and indented blocks, and without comments."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    return re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_code(page.read_text())))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(text: str) -> list[str]:
    """The paragraphs and the points of lists, as a reader sees them: no code, tables, headings or pictures."""
    kept = [line for line in without_code(text).splitlines() if not re.match(r"\s*(\||#|!\[)", line)]
    text = re.sub(r"\]\([^)]*\)", "]", "\n".join(kept)).replace("[", "").replace("]", "")
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def words(text: str) -> list[str]:
    """Its words: whatever has a letter or a digit in it."""
    return [word for word in text.split() if re.search(r"\w", word)]


def sentences(text: str) -> list[str]:
    """The sentences of its prose."""
    return [s for part in prose(text) for s in re.split(r"(?<=[.!?])[*)]*\s+(?=[A-Z`*(])", part) if words(s)]
