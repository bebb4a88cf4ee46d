"""Bounds of a formula's size, known before anything works it out: 10^{10^{10}} is short and never ends."""

from __future__ import annotations

import math
import re
from collections import deque

DIGITS = 100_000.0  # of the largest number worth working out
DEEPEST = 16  # brackets within brackets; parsers take exponentially longer with each
TOKEN = re.compile(r"\d+(?:[.,]\d+)*|\\[A-Za-z]+|\\.|\*\*|\S")
OPENING, CLOSING = set("({["), set(")}]")
GROWING = {"\\binom", "\\dbinom", "\\tbinom", "\\Gamma", "P", "C", "A"}  # take factorials of what follows; P_n^k too
SYMBOL = math.log10(2)  # a letter counts as a 2

Tokens = deque[str]


def is_modest(formula: str) -> bool:
    """Whether a formula, LaTeX or plain, is shallow enough to be parsed and small enough to be worked out."""
    tokens = deque(TOKEN.findall(formula))
    try:
        return depth(tokens) <= DEEPEST and group(tokens) <= DIGITS
    except RecursionError:  # a long tower of powers
        return False


def depth(tokens: Tokens) -> int:
    """The depth of brackets in brackets, whatever their kind; every other bar may open one too."""
    here, deepest = 0, tokens.count("|") // 2
    for token in tokens:
        here += (token in OPENING) - (token in CLOSING and here > 0)
        deepest = max(deepest, here)
    return deepest


def group(tokens: Tokens, ends: bool = False) -> float:
    """A bound on the digits of what stands here, to the end, or up to the bracket that `ends` it."""
    total = 0.0
    while tokens:
        if tokens[0] in CLOSING:
            tokens.popleft()
            if ends:
                break
        else:
            total += item(tokens, total)
    return total


def item(tokens: Tokens, before: float = 0.0) -> float:
    """The next number, letter, command or bracket, with the powers and factorials that are taken of it."""
    token = tokens.popleft()
    if token in OPENING:
        size = group(tokens, ends=True)
        if token == "(" and tokens and tokens[0] == "_":  # math-verify reads (n)_k as n! / (n - k)!
            size = factorial(size)
    elif token[0].isdecimal():
        size = logarithm(token.replace(",", "").partition(".")[0])
    elif token in GROWING:
        size = grown(tokens)
    elif token.isalpha() or len(token) > 2:
        size = SYMBOL + arguments(tokens)
    else:
        size = before if tokens and tokens[0] in ("^", "**", "!") else 0.0  # as in |...|^9
    while tokens and tokens[0] in ("^", "**", "!"):
        size = factorial(size) if tokens.popleft() == "!" else power(size, item(tokens) if tokens else 0.0)
    return size


def logarithm(digits: str) -> float:
    """To the base of 10, of a whole number, or of 2 if that is more."""
    return math.log10(max(2, int(digits[:15]))) + max(0, len(digits) - 15)


def arguments(tokens: Tokens) -> float:
    """The {} and [] of a command, such as a fraction's."""
    size = 0.0
    while tokens and tokens[0] in ("{", "["):
        tokens.popleft()
        size += group(tokens, ends=True)
    return size


def grown(tokens: Tokens) -> float:
    """A bound on the digits of a function of one or two arguments that grows as a factorial."""
    size = 0.0
    for _ in range(2):
        if tokens and tokens[0] in "_^":
            tokens.popleft()
        if tokens and (tokens[0] in OPENING or tokens[0][0].isdecimal()):
            size = max(size, item(tokens))
    return max(SYMBOL, factorial(size))


def power(base: float, exponent: float) -> float:
    """The digits of a power of numbers with so many digits."""
    return max(base, SYMBOL) * 10**exponent if exponent < 7 else math.inf


def factorial(size: float) -> float:
    """The digits of n!, if n has so many."""
    return size * 10**size if size < 7 else math.inf
