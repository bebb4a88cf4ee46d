"""Links and anchors of every page lead somewhere, and the README is short enough to be read."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from tests.docs.pages import DOCS, OTHERS, ROOT, anchors, links, sentences, without_code, words


@pytest.mark.parametrize("page", [*DOCS, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        path = (page.parent / target).resolve() if target else page
        if path.is_dir() and page.parent != ROOT:  # whose folders GitHub lists
            path = path / "README.md"
        assert path.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(path), f"{link} has no such heading"


def test_every_page_can_be_found_from_the_first() -> None:
    first = ROOT / "docs" / "index.md"
    found, left = {first}, [first]
    while left:
        page = left.pop()
        there = {(page.parent / link.partition("#")[0]).resolve() for link in links(page) if ".md" in link}
        left += [other for other in there - found if other.is_file()]
        found |= there
    assert {*DOCS[1:]} <= found


def test_the_readme_is_a_page_or_two() -> None:
    text = (ROOT / "README.md").read_text()
    count = len(words(without_code(text).replace("](", " ](")))
    assert 900 <= count <= 1200, f"{count} words outside code"
    assert median(len(words(sentence)) for sentence in sentences(text)) <= 16


@pytest.mark.parametrize("page", DOCS[1:], ids=lambda page: page.stem)
def test_pages_are_written_in_short_sentences(page: Path) -> None:
    said = [len(words(sentence)) for sentence in sentences(page.read_text())]
    findings = page.stem in ("gpu", "memory", "real_model")  # where much hangs on conditions
    assert median(said) <= (20 if findings else 16), f"the median sentence has {median(said)} words"
