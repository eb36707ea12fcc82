"""Drawing back what is over a budget: as little as it asks for, on what may be looked at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from holdfast.meters import Reading
from holdfast.meters.drift import Start
from holdfast.overshoot import FAR, settle

DOCUMENTS = 30
BASE = {f"d{i}": 1.5 + 0.05 * (i % 7) for i in range(DOCUMENTS)}
MEAN = sum(BASE.values()) / DOCUMENTS


def reading(rise: float, spread: float = 0.0) -> Reading:
    noise = np.random.default_rng(0).standard_normal(DOCUMENTS)
    noise -= noise.mean()
    items = {
        i: v + MEAN * (rise + spread * e) for (i, v), e in zip(BASE.items(), noise, strict=True)
    }
    return Reading("canary", "old", "selection", 1, 0.0, None, DOCUMENTS, "nats", items=items)


class Way:
    """A model whose only weight has moved by 1, and whose canary rises by a power of the way."""

    def __init__(self, end: float, power: float = 2.0, spread: float = 0.0) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.start = Start(self.model)
        nn.init.ones_(self.model.weight)
        self.end, self.power, self.spread, self.reads = end, power, spread, 0

    @property
    def gone(self) -> float:
        return self.model.weight.item()

    def read(self) -> list[Reading]:
        self.reads += 1
        rise = self.end * self.gone**self.power
        return [reading(rise, self.spread * rise)]


def settled(way: Way, budget: str = "1%"):  # type: ignore[no-untyped-def]
    return settle(way.start, way.read, [reading(0.0)], {"canary": budget}, 0.05)


def test_in_half_precision_rounding_does_not_add_up() -> None:
    """A weight drawn back by several tries is where one draw from both ends puts it."""
    model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    began = model.weight.detach().clone()
    start = Start(model)
    with torch.no_grad():
        model.weight += 0.01 * torch.randn_like(model.weight)
    end, put = model.weight.detach().clone(), start.way()
    for position in (0.37, 0.9, 0.11, 0.8):
        put(position)
    expected = (began.float() + 0.8 * (end.float() - began.float())).bfloat16()
    assert torch.equal(model.weight, expected)
    put(1.0)
    assert torch.equal(model.weight, end)


def test_a_budget_that_nothing_was_read_for_is_not_said_to_be_kept() -> None:
    way = Way(end=0.02)
    found = settle(way.start, lambda: [], [reading(0.0)], {"gsm8k": "2pt"}, 0.05)
    assert str(found).startswith("nothing that has a budget was read")
    assert way.gone == 1.0


def test_what_is_within_stays_where_it_is() -> None:
    way = Way(end=0.0085)
    found = settled(way)
    assert (way.gone, way.reads, found.scale) == (1.0, 1, 1.0)
    assert found.worst == pytest.approx(0.85)
    assert str(found) == "within the budget: canary/old is at most at 0.85 of it"


def test_room_is_left_for_what_other_texts_say() -> None:
    """0.95 of the budget is drawn back to 0.8: sqrt(0.8 / 0.95) of the way."""
    way = Way(end=0.0095)
    assert settled(way).worst == pytest.approx(0.8, rel=1e-5)
    assert way.gone == pytest.approx(math.sqrt(0.8 / 0.95))


def test_a_quadratic_rise_takes_one_try() -> None:
    """sqrt(0.8 / 8) of the way leaves 0.8 of the budget."""
    way = Way(end=0.08)
    found = settled(way)
    assert way.reads == 2
    assert way.gone == pytest.approx(found.scale) == pytest.approx(math.sqrt(0.1))
    assert found.worst == pytest.approx(0.8, rel=1e-5)
    assert "drawn back to 31.6% of the way" in str(found)


@given(st.floats(0.001, 3), st.floats(1, 4), st.floats(0, 0.5))
def test_whatever_the_way_it_ends_within_by_the_upper_bound(
    end: float, power: float, spread: float
) -> None:
    way = Way(end, power, spread)
    found = settled(way)
    assert found.worst <= 0.9 or found.likely
    assert end * way.gone**power <= 0.01


@given(st.floats(0.001, 0.012), st.floats(0, 0.03))
def test_a_bound_that_does_not_fall_takes_no_lesson_away(end: float, bound: float) -> None:
    """Rises of at most 1.2 budgets, 0.77 at 0.8 of the way; the bound is as far off everywhere."""
    way, wide = Way(end), bound * math.sqrt(DOCUMENTS) / 1.645

    def read() -> list[Reading]:
        return [reading(way.end * way.gone**2, wide)]

    found = settle(way.start, read, [reading(0.0)], {"canary": "1%"}, 0.05)
    assert way.gone == pytest.approx(found.scale)
    assert way.gone >= FAR
    assert found.worst <= 0.9 or found.estimate <= 0.8
    told = f"(no rise is estimated at more than {found.estimate:.2f})"
    assert (told in str(found)) == (found.worst > 0.9)
    assert not (str(found).startswith("within") and found.worst > 0.9)


def test_what_is_over_by_its_estimate_is_drawn_back_however_far() -> None:
    """1.4 budgets at the end, 0.9 at 0.8 of the way: there the lesson is, and too much is lost."""
    way = Way(end=0.014)
    found = settle(way.start, way.read, [reading(0.0)], {"canary": "1%"}, 0.05)
    assert found.scale < FAR
    assert found.worst == pytest.approx(0.8, rel=1e-5)


def test_where_the_rise_falls_faster_it_goes_forward_again() -> None:
    """A rise of s^4: sqrt(0.8 / 10) of the way leaves 0.064 of the budget, (0.8 / 10)^(1/4) 0.8."""
    way = Way(end=0.1, power=4.0)
    found = settled(way)
    assert way.reads == 3
    assert way.gone == pytest.approx(found.scale) == pytest.approx(0.08**0.25)
    assert found.worst == pytest.approx(0.8, rel=1e-4)


def test_what_is_over_on_the_way_forward_is_gone_back_from() -> None:
    way = Way(end=0.1, power=4.0)
    read, asked = way.read, []

    def jumping() -> list[Reading]:
        asked.append(way.gone)
        return [reading(0.5)] if len(asked) == 3 else read()

    found = settle(way.start, jumping, [reading(0.0)], {"canary": "1%"}, 0.05)
    assert asked[2] > asked[1]
    assert asked[1] < asked[3] < asked[2]
    assert way.gone == pytest.approx(found.scale)
    assert 0.7 <= found.worst <= 0.9


def test_where_no_try_is_within_the_weights_are_the_base_s() -> None:
    way = Way(end=0.1)
    found = settle(
        way.start,
        lambda: [reading(0.5 if way.gone else 0.0)],
        [reading(0.0)],
        {"canary": "1%"},
        0.05,
    )
    assert (way.gone, found.scale, found.worst) == (0.0, 0.0, 0.0)


def test_weights_that_are_no_numbers_are_taken_back_to_the_base() -> None:
    way = Way(end=math.nan)
    found = settle(
        way.start,
        lambda: [reading(math.nan if way.gone else 0.0)],
        [reading(0.0)],
        {"canary": "1%"},
        0.05,
    )
    assert way.gone == 0.0
    assert found.scale == 0.0
    assert found.worst == 0.0


def test_the_sealed_split_is_not_looked_at() -> None:
    from dataclasses import replace

    way = Way(end=0.5)
    sealed = [replace(reading(0.5), split="sealed")]
    found = settle(way.start, lambda: sealed, [reading(0.0)], {"canary": "1%"}, 0.05)
    assert found.scale == 1.0
    assert torch.equal(way.model.weight, torch.ones(1, 1))
