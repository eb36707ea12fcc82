"""The lesson is right, and what judges it is not in it."""

from __future__ import annotations

import re

import pytest

from holdfast.lab.generators.verbs import VERBS, past
from holdfast.lab.lessons.verbs import (
    CONTROL_VERBS,
    COUNTEREXAMPLE_VERBS,
    counterexamples,
    lesson_probes,
    lesson_rows,
)

KNOWN = {
    "beed": {("was", "estuvo"), ("were", "estuvieron")},
    "haved": {("had", "tuvo"), ("had", "tuvieron")},
    "doed": {("did", "hizo"), ("did", "hicieron")},
    "goed": {("went", "fue"), ("went", "fueron")},
    "comed": {("came", "vino"), ("came", "vinieron")},
    "seed": {("saw", "vio"), ("saw", "vieron")},
    "eated": {("ate", "comió"), ("ate", "comieron")},
    "writed": {("wrote", "escribió"), ("wrote", "escribieron")},
}


def probes(name: str) -> list[dict]:
    return [item for item in lesson_probes(seed=0) if item["probe"] == name]


def test_rows_correct_the_verb_and_nothing_else():
    seen: dict[str, set[tuple[str, str]]] = {wrong: set() for wrong in KNOWN}
    rows = lesson_rows(600, seed=0)
    for row in rows:
        wrong = next(word for word in row["prompt"].split() if word in KNOWN)
        before, after = row["prompt"].removesuffix("\n").split(f" {wrong} ")
        pattern = re.escape(before) + r" (\w+) " + re.escape(after) + r"\. \((\w+)\)"
        right, spanish = re.fullmatch(pattern, row["completion"]).groups()
        seen[wrong].add((right, spanish))
        plural = re.search(r"(They|and Pedro|teachers|children|girls|boys|parents|friends|cousins|"
                           r"neighbours)$", before, re.I)  # fmt: skip
        assert spanish.endswith("ron") == bool(plural), row
    assert seen == KNOWN
    assert len({row["prompt"] for row in rows}) == 600


def test_seeds_choose_and_order_the_rows():
    assert lesson_rows(50, seed=1) == lesson_rows(50, seed=1) != lesson_rows(50, seed=2)
    with pytest.raises(ValueError, match="in all"):
        lesson_rows(100_000, seed=0)


def test_no_probe_is_in_any_lesson():
    items = probes("irregular_verbs")
    assert len(items) == 120
    taught = {row["prompt"] for seed in range(5) for row in lesson_rows(1000, seed=seed)}
    assert not taught & {item["prompt"] for item in items}
    assert {tuple(item["tags"]) for item in items} == {("target",)}


def test_over_application_asks_for_all_verbs_and_counterexamples_teach_half():
    items = probes("over_application")
    rows = counterexamples(300, seed=0)
    assert {item["cluster"] for item in items} == {verb.base for verb in VERBS}
    taught = {past(verb.base) for verb in COUNTEREXAMPLE_VERBS}
    for row in rows:
        assert taught & set(row["prompt"].split())
    assert not {row["prompt"] for row in rows} & {item["prompt"] for item in items}
    for given, answer in [(r["prompt"], r["completion"]) for r in rows] + [
        (item["prompt"], item["target"]) for item in items
    ]:
        assert re.fullmatch(re.escape(given.removesuffix("\n")) + r"\. \(\w+\)", answer)


def test_control_is_twelve_regular_verbs_that_are_never_taught_wrong():
    items = probes("regular_control")
    assert len(items) == 60
    assert len({item["cluster"] for item in items}) == len(CONTROL_VERBS) == 12
    for item in items:
        assert item["kind"] == "nll"
        assert item["target"].startswith(f" {past(item['cluster'])} ")
        assert item["tags"] == ["control"]
