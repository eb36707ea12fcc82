"""Checks on made-up readings: what is read when, at which rate of false alarms, and resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.alarms import Alarm
from holdfast.alarms.guardrails import guardrails
from holdfast.alarms.rules import Alarms
from holdfast.alarms.sentry import Sentry
from holdfast.gate.margins import Gate
from holdfast.meters import Reading

Model = Callable[[np.random.Generator, str, np.ndarray, int], np.ndarray]
"""Values of some items after so many steps, given those under the base."""


def reading(meter: str, name: str, values: dict[str, float], **more: Any) -> Reading:
    unit = "nats" if meter == "canary" else "accuracy"
    mean = sum(values.values()) / len(values)
    given = {"split": "selection", "step": 0, "stderr": None, "unit": unit, **more}
    return Reading(meter, name, value=mean, n=len(values), items=values, **given)


def base(rng: np.random.Generator, items: int = 100) -> list[Reading]:
    """Two canaries, two guardrails, and what is no guardrail."""
    found = [
        reading("canary", name, {f"{name}{i}": float(v) for i, v in enumerate(values)})
        for name, values in (
            ("web", rng.gamma(20, 0.1, items)),
            ("code", rng.gamma(20, 0.05, items)),
        )
    ]
    for name, tags in (("mmlu", ()), ("rare_words", ("rare",)), ("lesson", ("target",))):
        right = rng.random(items) < 0.8
        values = {f"{name}{i}": float(v) for i, v in enumerate(right)}
        found.append(reading("probe", name, values, tags=tags))
    return [*found, reading("canary", "web", {"s": 1.0}, split="sealed")]


def patrol(
    sentry: Sentry, model: Model, rng: np.random.Generator, steps: range
) -> list[tuple[int, Alarm]]:
    """Check at each of these steps a model whose values are made up."""
    raised = []
    for step in steps:
        found = []
        for g in sentry.guardrails:
            if items := sentry.wanted().get(g.key):
                sign = -1 if g.unit == "nats" else 1
                before = sign * np.array([g.before[i] for i in items])
                after = model(rng, g.key, before, step)
                found.append(
                    reading(g.meter, g.name, dict(zip(items, map(float, after), strict=True)))
                )
        _, alarms = sentry.check(found, step)
        raised += [(step, alarm) for alarm in alarms]
    return raised


def post(rng: np.random.Generator, **rule: Any) -> Sentry:
    settings = Alarms(**rule)
    return Sentry(guardrails(base(rng), Gate(), settings), settings)


def steady(rng: np.random.Generator, key: str, before: np.ndarray, step: int) -> np.ndarray:
    """A model that is other than the base, and no worse."""
    if key.startswith("canary"):
        return before + rng.normal(0, 0.03, len(before))
    flipped = rng.random(len(before)) < 0.05
    right = rng.random(len(before)) < 0.8
    return np.where(flipped, right, before).astype(float)


def test_targets_and_the_sealed_split_are_not_watched() -> None:
    sentry = post(np.random.default_rng(0))
    keys = ["canary/web", "canary/code", "probe/mmlu", "probe/rare_words"]
    assert [g.key for g in sentry.guardrails] == keys
    web = sentry.guardrails[0]
    assert web.margin == pytest.approx(0.01 * -np.mean(list(web.before.values())))


def test_blocks_are_disjoint_until_all_are_read_and_then_read_together() -> None:
    rng = np.random.default_rng(0)
    sentry = post(rng, block=20)
    read: list[set[str]] = []
    for step in range(10, 200, 10):
        read.append(set(sentry.wanted().get("probe/mmlu", ())))
        patrol(sentry, steady, rng, range(step, step + 1))
    fresh, late = read[:5], read[5:]
    assert sum(map(len, fresh)) == len(set().union(*fresh)) == 100
    assert [len(items) for items in late] == [0, 0, 0, 0, 100] * 2 + [0, 0, 0, 0]


@pytest.mark.parametrize("block", [20, 50])
def test_false_alarms_are_rarer_than_alpha(block: int) -> None:
    """200 runs of a model no worse than the base, 40 checks each; any alarm counts.

    At a rate of alpha 10 are expected; beyond 10 + 3 sqrt(200 * 0.05 * 0.95) = 19 it is higher.
    """
    any_alarm = 0
    for run in range(200):
        rng = np.random.default_rng(run)
        any_alarm += bool(patrol(post(rng, block=block), steady, rng, range(10, 410, 10)))
    assert any_alarm <= 19


@pytest.mark.parametrize(
    ("key", "fall"),
    [("canary/web", 0.2), ("canary/code", 0.2), ("probe/mmlu", 0.3), ("probe/rare_words", 0.3)],
)
def test_a_fall_is_told_by_its_name_and_once(key: str, fall: float) -> None:
    rng = np.random.default_rng(1)

    def falling(rng: np.random.Generator, name: str, before: np.ndarray, step: int) -> np.ndarray:
        if name != key:
            return steady(rng, name, before, step)
        lost = rng.random(len(before)) < fall
        return before * (1 + fall) if key.startswith("canary") else np.where(lost, 0.0, before)

    raised = patrol(post(rng), falling, rng, range(10, 410, 10))
    assert [alarm.name for _, alarm in raised] == [key]
    assert raised[0][0] <= 50, "while items are fresh"
    assert key in raised[0][1].text
    assert "0.05 over 4 guardrails" in raised[0][1].text


def test_a_fall_after_the_fresh_items_is_told_too() -> None:
    rng = np.random.default_rng(2)

    def late(rng: np.random.Generator, name: str, before: np.ndarray, step: int) -> np.ndarray:
        return steady(rng, name, before, step) if step < 200 else before * 0.3

    raised = patrol(post(rng), late, rng, range(10, 410, 10))
    assert {alarm.name for _, alarm in raised} == {"probe/mmlu", "probe/rare_words"}
    assert min(step for step, _ in raised) >= 200


def test_a_value_that_is_no_number_is_an_alarm() -> None:
    rng = np.random.default_rng(3)

    def broken(rng: np.random.Generator, name: str, before: np.ndarray, step: int) -> np.ndarray:
        return before * math.nan if name == "canary/web" else before

    raised = patrol(post(rng), broken, rng, range(10, 20, 10))
    assert [alarm.name for _, alarm in raised] == ["canary/web"]
    assert "not numbers" in raised[0][1].text


@given(stop=st.integers(0, 14), seed=st.integers(0, 3))
def test_resumed_it_goes_on_to_the_last_bit(stop: int, seed: int) -> None:
    def falling(rng: np.random.Generator, name: str, before: np.ndarray, step: int) -> np.ndarray:
        values = np.random.default_rng(step).random(len(before))
        return before * (1 + 0.2 * values) if name == "canary/web" else before

    rng = np.random.default_rng(seed)
    whole, lines = post(np.random.default_rng(seed)), []
    for step in range(15):
        alarms = [
            alarm.as_dict() for _, alarm in patrol(whole, falling, rng, range(step, step + 1))
        ]
        lines.append(json.loads(json.dumps({"alarms": alarms, **whole.as_dict()})))
    again = post(np.random.default_rng(seed))
    again.resume(lines[:stop])
    patrol(again, falling, rng, range(stop, 15))
    assert again.as_dict() == whole.as_dict()
    assert again.raised == whole.raised
