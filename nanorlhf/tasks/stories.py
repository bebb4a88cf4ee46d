"""The built-in `stories` dataset: titles such as "The old fox and the river:", for a model to tell the story."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from datasets import Dataset

MOODS = ("old", "young", "quiet", "brave", "hungry", "lazy", "clever", "proud", "lonely", "merry")
HEROES = (
    *("fox", "owl", "hare", "bear", "mouse", "crow", "goat", "wolf", "frog", "duck"),
    *("horse", "snail", "otter", "robin", "badger", "heron", "cat", "dog", "bee", "mole"),
)
PLACES = (
    *("river", "hill", "forest", "mill", "garden", "harbour", "bridge", "meadow", "castle", "market"),
    *("lake", "village", "cave", "barn", "island", "tower", "valley", "orchard", "well", "field"),
)


def titles(split: str) -> list[tuple[str, str, str]]:
    """Mood, hero and place of one split's titles; a checksum puts every tenth title, or so, into "test" for good."""
    if split not in ("train", "test"):
        raise ValueError(f"the stories dataset has no split {split!r}: choose 'train' or 'test'")
    every = product(MOODS, HEROES, PLACES)
    return [words for words in every if (crc32(" ".join(words).encode()) % 10 == 0) == (split == "test")]


def title(mood: str, hero: str, place: str) -> str:
    """The prompt itself."""
    return f"The {mood} {hero} and the {place}:"


def stories(split: str) -> Dataset:
    """One column, `prompt` (text)."""
    from datasets import Dataset  # takes a second to import, and most commands never need it

    return Dataset.from_dict({"prompt": [title(*words) for words in titles(split)]})
