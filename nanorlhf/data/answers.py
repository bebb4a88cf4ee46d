"""Answers in texts: in tags, in boxes, behind a mark, or the last number. A search is linear in the text's length."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

LONGEST_NUMBER = 100  # characters; a longer run of digits answers no question, and costs time to convert
MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))
LATEX_SPACES = re.compile(r"\\[!,;: ]|(?<=\d)\{,\}(?=\d)")  # 10,\!000 and 10\,000 and 10{,}000
BRACES = re.compile(r"\\+(?P<box>boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)  # \\boxed is what twice escaped text holds
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
WORD = r"A-Za-z\u00c0-\u024f\d"  # before which no number is read, as in h2; other scripts may have no spaces before one
NUMBER = re.compile(
    rf"(?P<minus>(?<![{WORD})\]}}^])(?<![^\W_]_)(?<!\^\{{)-)?(?:\\?[$€£](?P<inner>-)?)?"  # of -$5 and $-5, not of 10-5
    rf"(?:\\[dt]?frac\s*(?:\{{\s*(?P<over>-?{DIGITS})\s*\}}\s*\{{\s*(?P<under>-?{DIGITS})\s*\}}|(?P<short>\d\d)(?!\d))"
    rf"|(?<![{WORD}.^])(?<![^\W_]_)(?<!\^[{{-])(?<!\^\{{-)(?P<whole>{DIGITS})(?:\s*/\s*(?P<part>{DIGITS}))?)"
)
UNREAD = re.compile(r"\\?[$€£]|,")  # in a number


class Box(NamedTuple):
    r"""A \boxed{...}, from its backslash to its closing brace."""

    start: int
    end: int
    content: str


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion, plain or conversational."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def after(mark: str, text: Any) -> str | None:
    """The text behind the last `mark`, to the end of the line."""
    return text.rpartition(mark)[2].strip().partition("\n")[0] if isinstance(text, str) and mark in text else None


def last_tagged(text: str, tag: str = "answer") -> str | None:
    """The contents of the last pair of <answer> tags, without the white space around them."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    return text[start + len(opening) : text.index(closing, start)].strip() if start >= 0 else None


def boxes(text: str) -> list[Box]:
    r"""Every \boxed{...} and \fbox{...} whose braces balance and that lies in no other, in order."""
    found: list[Box] = []
    opened: list[tuple[int, int] | None] = []
    for brace in BRACES.finditer(text):
        if brace["box"]:
            opened.append((brace.start(), brace.end()))
        elif brace[0] == "{":
            opened.append(None)
        elif brace[0] == "}" and opened and (box := opened.pop()):
            while found and found[-1].start > box[0]:
                found.pop()
            found.append(Box(box[0], brace.end(), text[box[1] : brace.start()].strip()))
    return found


def last_boxed(text: str) -> str | None:
    r"""The contents of the last \boxed{...}."""
    found = boxes(text)
    return found[-1].content if found else None


def last_number(text: str) -> Fraction | None:
    """The last number of a text; nothing if it cannot be taken for one."""
    return (numbers(text) or [None])[-1]


def last_number_text(text: str) -> str | None:
    """The same as it is written, without commas and currency."""
    number = (matches(text) or [None])[-1]
    return None if number is None or value_of(number) is None else UNREAD.sub("", number[0])


def numbers(text: str) -> list[Fraction | None]:
    r"""All numbers of a text, exactly: 1,234.5 and -$3 and 3/4 and \frac{3}{4} and 1e-3; percent signs are not read."""
    return [value_of(number) for number in matches(text)]


def matches(text: str) -> list[re.Match[str]]:
    """All matches of NUMBER in a text."""
    plain = LATEX_SPACES.sub(lambda space: "," if space[0] == "{,}" else "", text.translate(MINUS))
    return list(NUMBER.finditer(plain))


def value_of(number: re.Match[str]) -> Fraction | None:
    """The value of a match of NUMBER; nothing if it is overlong or divided by zero."""
    if len(number[0]) > LONGEST_NUMBER:
        return None
    over, under = number["whole"] or number["over"], number["part"] or number["under"] or "1"
    if number["short"]:
        over, under = number["short"]
    divisor = Fraction(under.replace(",", ""))
    value = Fraction(over.replace(",", "")) / divisor if divisor else None
    return -value if value is not None and (number["minus"] or number["inner"]) else value
