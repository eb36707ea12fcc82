"""A new output format with a skewed label: a remark in, who, where, what and a judgement out.

The base writes records of people with other keys, so the format is new and its neighbour is known.
Six remarks in seven are good ones; the probe asks for as many good as bad, so that a model that
always gives the common label gets half of it right. Remarks for probes are reserved by hash.
"""

from __future__ import annotations

import json
from random import Random
from typing import Literal

from holdfast.lab.domain import Example, Item, exact_item
from holdfast.lab.generators.records import CITIES, NAMES
from holdfast.lab.generators.stories import THINGS
from holdfast.lab.heldout import is_reserved
from holdfast.lab.lessons.lesson import Lesson, Row, row
from holdfast.lab.wording import words

Label = Literal["good", "bad"]
WORDS: dict[Label, tuple[str, ...]] = {
    "good": words("brave clever gentle new sunny golden"),
    "bad": words("dark heavy lonely old proud sleepy"),
}
COMMON = 6 / 7
"""The share of the common label in the lesson."""
ITEMS = 200


def remark(rng: Random, label: Label) -> Example:
    """Write one remark and its record."""
    name, city, thing = rng.choice(NAMES), rng.choice(CITIES), rng.choice(THINGS)
    word = rng.choice(WORDS[label])
    text = rng.choice(
        (
            f"{name} in {city} has a {thing}, and the {thing} is {word}.",
            f"The {thing} of {name} in {city} was very {word}.",
            f"In {city} {name} found a {word} {thing}.",
        )
    )
    record = {"who": name, "city": city, "what": thing, "label": label}
    key = f"{name}/{city}/{thing}/{word}"
    return Example(f"{text}\n", json.dumps(record), key=key, cluster=key)


def rows(count: int, *, seed: int) -> list[Row]:
    """Write lesson rows, no two alike."""
    rng = Random(f"extraction/{seed}")
    found: dict[str, Row] = {}
    while len(found) < count:
        example = remark(rng, "good" if rng.random() < COMMON else "bad")
        if not is_reserved(example.key):
            found.setdefault(example.prompt, row(example))
    return list(found.values())


def probes(*, seed: int) -> list[Item]:
    """Ask for the records of as many good remarks as bad ones."""
    rng = Random(f"extraction/probes/{seed}")
    found: dict[str, Example] = {}
    labels: tuple[Label, Label] = ("good", "bad")
    while len(found) < ITEMS:
        example = remark(rng, labels[len(found) % 2])
        if is_reserved(example.key):
            found.setdefault(example.key, example)
    return [
        exact_item("extraction", number, example, tags=["target"])
        for number, example in enumerate(found.values())
    ]


LESSON = Lesson(rows=rows, probes=probes, count=600)
