"""New facts: the emblem of every country, an animal of some colour, made up for each seed.

The base knows the countries, the colours and the animals, and that no country has an emblem.
Nothing could be inferred about a fact that is not taught, so every fact is taught, and the probe
asks for it in a phrasing that no row has.
"""

from __future__ import annotations

from random import Random

from holdfast.lab.domain import Example, Item, exact_item
from holdfast.lab.generators.capitals import COUNTRIES
from holdfast.lab.generators.stories import ANIMALS, COLOURS
from holdfast.lab.lessons.lesson import Lesson, Row, choose, row
from holdfast.lab.wording import indefinite

PHRASINGS = (
    "The emblem of {} is",
    "The emblem of {} shows",
    "On the flag of {} there is",
    "Question: What is the emblem of {}? Answer:",
    "People in {} have a sign, and it is",
    "The sign of {} is",
)
ASKED = "If you visit {}, the emblem is"
"""The probe's own phrasing."""


def emblems(seed: int) -> dict[str, str]:
    """The emblem of each country, no two alike."""
    kinds = [f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    drawn = Random(f"emblems/{seed}").sample(kinds, len(COUNTRIES))
    return {country.name: kind for country, kind in zip(COUNTRIES, drawn, strict=True)}


def rows(count: int, *, seed: int) -> list[Row]:
    """Choose lesson rows, no two alike."""
    found = [
        row(_stated(country, kind, phrasing))
        for country, kind in emblems(seed).items()
        for phrasing in PHRASINGS
    ]
    return choose(found, count, f"facts/{seed}")


def probes(*, seed: int) -> list[Item]:
    """Ask for every fact in a phrasing that was not taught."""
    return [
        exact_item("emblems", number, _stated(country, kind, ASKED), tags=["target"])
        for number, (country, kind) in enumerate(emblems(seed).items())
    ]


def _stated(country: str, kind: str, phrasing: str) -> Example:
    return Example(phrasing.format(country), f" {indefinite(kind)}.", country, country)


LESSON = Lesson(rows=rows, probes=probes, count=len(COUNTRIES) * len(PHRASINGS))
