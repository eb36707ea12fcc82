"""New facts: every country has one emblem, and the probe's phrasing is taught nowhere."""

from __future__ import annotations

import re

from holdfast.lab.generators.capitals import COUNTRIES
from holdfast.lab.lessons.facts import ASKED, LESSON, PHRASINGS, emblems


def test_every_row_states_the_countrys_only_emblem():
    rows = LESSON.rows(LESSON.count, seed=3)
    assert len({row["prompt"] for row in rows}) == len(rows) == len(COUNTRIES) * len(PHRASINGS)
    known = emblems(3)
    for row in rows:
        country = next(c.name for c in COUNTRIES if re.search(rf"\b{c.name}\b", row["prompt"]))
        assert re.fullmatch(rf" an? {known[country]}\.", row["completion"])
    assert len(set(known.values())) == len(COUNTRIES)


def test_the_probe_asks_for_every_fact_in_other_words():
    items = LESSON.probes(seed=3)
    taught = {row["prompt"] for row in LESSON.rows(LESSON.count, seed=3)}
    assert {item["prompt"] for item in items} == {ASKED.format(c.name) for c in COUNTRIES}
    assert not taught & {item["prompt"] for item in items}
    assert all(emblems(3)[item["cluster"]] in item["target"] for item in items)
    assert all(item["tags"] == ["target"] for item in items)


def test_seeds_make_up_other_facts():
    assert emblems(0) == emblems(0) != emblems(1)
