"""What a lesson is: rows to learn from, and the probes that judge whether it was learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeVar

from holdfast.lab.domain import Example, Item

T = TypeVar("T")
Row = dict[str, str]
"""A lesson row: prompt and completion."""


class Rows(Protocol):
    """Chooses lesson rows, no two alike."""

    def __call__(self, count: int, *, seed: int) -> list[Row]:
        """`count` rows of this seed."""
        ...


class Probes(Protocol):
    """Writes what a lesson is judged by."""

    def __call__(self, *, seed: int) -> list[Item]:
        """The items of this seed; those of the target are tagged so."""
        ...


@dataclass(frozen=True)
class Lesson:
    """One lesson of the lab."""

    rows: Rows
    probes: Probes
    count: int
    """Rows of it in a lesson file."""


def row(example: Example) -> Row:
    """Write an example as a lesson row."""
    return {"prompt": example.prompt, "completion": example.target}


def choose(population: Sequence[T], count: int, seed: str) -> list[T]:
    """Draw without replacement.

    Raises:
        ValueError: more are asked for than there are.
    """
    if count > len(population):
        raise ValueError(f"{count} are asked for, and there are {len(population)} in all")
    return Random(seed).sample(population, count)
