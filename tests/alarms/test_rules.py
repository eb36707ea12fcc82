"""The section `alarms`: its words, its defaults, and what it refuses."""

from __future__ import annotations

import pytest

from holdfast.errors import RequestError
from holdfast.recipe import load_recipe

BASIC = {"model": "base", "data": "lesson.jsonl"}


@pytest.mark.parametrize("word", ["none", "off", "false", "null"])
def test_none_turns_it_off(word: str) -> None:
    assert not load_recipe(None, [f"alarms={word}"], **BASIC).alarms.enabled


def test_what_is_not_said() -> None:
    alarms = load_recipe(**BASIC).alarms
    assert (alarms.enabled, alarms.every, alarms.share, alarms.stop) == (True, None, 0.05, False)
    assert alarms.rate == pytest.approx(0.015)  # 1.5 points per 1000 steps


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("alarms.fall=1%", "1.5pt"),
        ("alarms.fall=2", "2pt"),
        ("alarms.every=0", "alarms.every"),
        ("alarms.share=0", "alarms.share"),
        ("alarms.alpha=0.5", "alarms.alpha"),
        ("alarms.webhook=ftp://here", "https://"),
        ("alarms.command=''", "mail"),
        ('alarms.command="mail \'me"', "mail"),
        ("alarms.stopp=true", "stop"),
        ("alarms.fall=2pt", "train.measure_probes: true"),  # nothing would be watched by it
    ],
)
def test_refused_in_one_line(word: str, told: str) -> None:
    with pytest.raises(RequestError) as refused:
        load_recipe(None, [word], **BASIC)
    (line,) = refused.value.problems
    assert told in line


def test_a_fall_of_probes_that_are_read() -> None:
    words = ["alarms.fall=2pt", "train.measure_probes=true", "probes=[items.jsonl]"]
    assert load_recipe(None, words, **BASIC).alarms.rate == pytest.approx(0.02)
