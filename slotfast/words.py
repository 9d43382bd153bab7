"""How numbers are written for people, and what a misspelt word may have meant."""

import difflib
from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """A number of things: `1 window`, `1,024 windows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nearest(word: str, known: Iterable[str], phrase: str = "the nearest is") -> str:
    """`; the nearest is WORD`, where a known word is spelt nearly so, or is the only one to begin so; else nothing."""
    bare, word = {each.strip("-"): each for each in known}, word.strip("-")
    longer = [each for each in bare if len(word) > 2 and each.startswith(word)]
    near = difflib.get_close_matches(word, list(bare), 1, cutoff=0.75) or longer[: len(longer) == 1]
    return f"; {phrase} {bare[near[0]]}" if near else ""
