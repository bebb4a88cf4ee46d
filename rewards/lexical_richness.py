"""The variety of a completion's words: a moving-average type-token ratio, less if the text is short."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from functools import cache
from typing import Any

from nanorlhf.data.answers import text_of

WINDOW = 50  # words; a shorter text is one window, and its ratio the plain one


def lexical_richness(
    completions: list[Any], *, brevity_penalty_scale: float = 1.0, target_words: int = 20, **_: Any
) -> list[float]:
    """Moving-average type-token ratio (Covington & McFall 2010, doi:10.1080/09296171003643098) times a brevity penalty.

    The penalty is BLEU's (Papineni et al. 2002, doi:10.3115/1073083.1073135) to the power of `brevity_penalty_scale`:
    exp(scale * (1 - target_words / words)) below `target_words`, else 1. With 0 a single word is perfectly rich.
    """
    rewards = []
    for completion in completions:
        words = words_of(text_of(completion))
        shortfall = min(0.0, 1 - target_words / len(words)) if words else 0.0
        rewards.append(moving_average_ttr(words) * math.exp(brevity_penalty_scale * shortfall))
    return rewards


def words_of(text: str) -> list[str]:
    """Runs of letters in any script, case folded; digits and symbols are no words, for they would be cheap variety."""
    return "".join(map(within_word, unicodedata.normalize("NFKC", text).casefold())).split()


@cache
def within_word(character: str) -> str:
    """A letter or an accent as it is, a space for what parts words, nothing for apostrophes and invisible marks."""
    category = unicodedata.category(character)
    if category[0] in "LM":
        return character
    return "" if character in "'\u2019" or category == "Cf" else " "


def moving_average_ttr(words: list[str], window: int = WINDOW) -> float:
    """Distinct words over words, the mean over every window of so many words; 0 if there is no word."""
    if not words:
        return 0.0
    size = min(window, len(words))
    counts = Counter(words[:size])
    distinct = len(counts)
    for leaving, coming in zip(words, words[size:], strict=False):
        counts[coming] += 1
        counts[leaving] -= 1
        if not counts[leaving]:
            del counts[leaving]
        distinct += len(counts)
    return distinct / (size * (len(words) - size + 1))
