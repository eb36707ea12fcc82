"""Hungarian number words, `37 = harminchét`: the rare domain, the corpus's long tail."""

from __future__ import annotations

from random import Random

from holdfast.lab.domain import Domain, Example

UNITS = ("", "egy", "kettő", "három", "négy", "öt", "hat", "hét", "nyolc", "kilenc")
TENS = (
    "",
    "tíz",
    "húsz",
    "harminc",
    "negyven",
    "ötven",
    "hatvan",
    "hetven",
    "nyolcvan",
    "kilencven",
)
JOINED_TENS = ("", "tizen", "huszon", *TENS[3:])
"""Ten and twenty change their form when a unit follows."""


def hungarian(number: int) -> str:
    """Spell a whole number from 1 to 99 in Hungarian."""
    if not 1 <= number <= 99:
        raise ValueError(f"only 1 to 99 can be spelt, not {number}")
    tens, unit = divmod(number, 10)
    return JOINED_TENS[tens] + UNITS[unit] if unit else TENS[tens]


def spell(number: int) -> Example:
    """Write one number with its word."""
    return Example(f"{number} =", f" {hungarian(number)}", str(number), str(number))


def example(rng: Random) -> Example:
    """Write some number from 1 to 99 with its word."""
    return spell(rng.randint(1, 99))


def facts() -> list[Example]:
    """All ninety-nine numbers."""
    return [spell(number) for number in range(1, 100)]


DOMAIN = Domain(
    "hungarian",
    share=0.0075,
    example=example,
    length=(8, 14),
    tags=("guardrail", "rare"),
    facts=facts,
)
