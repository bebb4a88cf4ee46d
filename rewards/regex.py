"""1 if the option `pattern`, a Python regular expression, is found in the completion, else 0.

Flags stand in the pattern: (?i) ignores case, (?s) lets a dot be a new line. A pattern that backtracks without end is
stopped by the time limit of the process that runs it, and such a completion stays unscored.
"""

from __future__ import annotations

import re
from typing import Any

from nanorlhf.data.answers import text_of
from nanorlhf.errors import UsageError


def regex(completions: list[Any], *, pattern: str = "", full: bool = False, **_: Any) -> list[float]:
    """Whether the pattern is found; `full`: whether it is the whole text, white space around it aside."""
    compiled = re.compile(pattern)
    texts = map(text_of, completions)
    return [float(bool(compiled.fullmatch(text.strip()) if full else compiled.search(text))) for text in texts]


def check(pattern: str, **_: Any) -> None:
    """Refuses a pattern that is missing or no regular expression."""
    if not pattern:
        raise UsageError(r"""reward_options: regex needs a pattern, such as '{regex: {pattern: "is \\d+"}}'""")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"reward_options: regex's pattern={pattern!r} is no regular expression: {error}") from error
