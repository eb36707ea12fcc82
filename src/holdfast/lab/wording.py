"""Small helps for writing English."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """Split a list of words that is written as one string."""
    return tuple(text.split())


def indefinite(phrase: str) -> str:
    """Put `a` or `an` before a phrase, by its first letter."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
