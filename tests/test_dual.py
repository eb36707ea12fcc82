"""The controller's arithmetic: bounded, monotone, still where it should be, and it converges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.dual import (
    BACK_LEAST,
    DRIFT,
    ENDING,
    GAIN,
    LATE,
    RATE_LEAST,
    REPAIRED,
    SHARE_LEAST,
    SLACK,
    WEIGHT_LEAST,
    WEIGHT_MOST,
    Level,
    Strengths,
    Z,
    allowed,
    bounds,
    drawn_back,
    heard,
    moved,
    strengths,
    worst_upper,
)
from holdfast.theory import Strengths as Pull
from holdfast.theory import TwoTasks, fixed_point

LOW, HIGH = bounds()
INSIDE = st.floats(LOW, HIGH)
BUDGETS = st.floats(-1e3, 1e6)


@given(INSIDE, BUDGETS)
def test_no_check_moves_far_or_out_of_bounds(x: float, worst: float) -> None:
    now = moved(x, worst)
    assert LOW <= now <= HIGH
    assert abs(now - x) <= GAIN + 1e-12
    assert moved(x, math.inf) == min(x + GAIN, HIGH)


@given(INSIDE, BUDGETS, BUDGETS)
def test_a_larger_rise_never_loosens(x: float, one: float, other: float) -> None:
    assert moved(x, max(one, other)) >= moved(x, min(one, other))


@given(INSIDE, st.floats(SLACK, 1))
def test_within_the_budget_but_for_the_noise_nothing_moves(x: float, worst: float) -> None:
    assert moved(x, worst) == x


@given(INSIDE, BUDGETS, st.floats(0, 1), st.floats(0, 1))
def test_what_is_still_to_fall_spares_tightening_and_loosens_nothing(
    x: float, worst: float, one: float, other: float
) -> None:
    sooner, later = (allowed(f(one, other)) for f in (max, min))
    assert moved(x, worst, sooner) <= moved(x, worst, later)
    assert moved(x, worst, sooner) >= moved(x, min(worst, 1.0))
    assert allowed(0.0) == 1.0


@given(INSIDE, INSIDE)
def test_what_is_tightened_first_is_the_weight_and_last_the_step(one: float, other: float) -> None:
    low, high = strengths(min(one, other)), strengths(max(one, other))
    assert low.weight <= high.weight
    assert low.share >= high.share
    assert low.rate >= high.rate
    for now in (low, high):
        assert WEIGHT_LEAST - 1e-12 <= now.weight <= WEIGHT_MOST + 1e-12
        assert SHARE_LEAST - 1e-12 <= now.share <= 1
        assert RATE_LEAST - 1e-12 <= now.rate <= 1
        if now.share < 1:
            assert now.weight == pytest.approx(WEIGHT_MOST)
        if now.rate < 1:
            assert now.share == pytest.approx(SHARE_LEAST)


def test_the_bounds_are_reached_and_the_recipe_is_in_the_middle() -> None:
    assert strengths(0.0) == Strengths()
    low, high = strengths(LOW), strengths(HIGH)
    assert (low.weight, low.share, low.rate) == pytest.approx((WEIGHT_LEAST, 1, 1))
    assert (high.weight, high.share, high.rate) == pytest.approx(
        (WEIGHT_MOST, SHARE_LEAST, RATE_LEAST)
    )


@given(st.floats(0, 0.69), BUDGETS)
def test_where_nothing_holds_the_base_only_the_step_moves(x: float, worst: float) -> None:
    low, high = bounds(held=False)
    assert low <= moved(x, worst, held=False) <= high
    assert strengths(x, held=False) == Strengths(rate=pytest.approx(math.exp(-x)))
    assert strengths(high, held=False).rate == pytest.approx(RATE_LEAST)


@given(st.floats(-10, 10), st.floats(0, 10), st.floats(-10, 10), st.floats(0.01, 10))
def test_a_reading_draws_the_belief_towards_it_and_narrows_it(
    mean: float, variance: float, rise: float, stderr: float
) -> None:
    now = heard(Level(mean, variance), rise, stderr)
    slack = 1e-9 * (1 + abs(mean) + abs(rise))
    assert min(mean, rise) - slack <= now.mean <= max(mean, rise) + slack
    assert now.variance <= min(variance + (DRIFT * max(1, abs(rise))) ** 2, stderr**2) * (1 + 1e-9)
    assert now.lower <= now.mean <= now.upper


def test_the_belief_is_the_bayesian_one() -> None:
    """Product of two normal densities, on a grid."""
    before, rise, stderr = Level(0.4, 0.05), 1.3, 0.6
    grid = np.linspace(-8, 8, 200_001)
    density = np.exp(-((grid - 0.4) ** 2) / (2 * (0.05 + (DRIFT * rise) ** 2))) * np.exp(
        -((grid - rise) ** 2) / (2 * stderr**2)
    )
    density /= density.sum()
    mean = float((grid * density).sum())
    now = heard(before, rise, stderr)
    assert now.mean == pytest.approx(mean, abs=1e-6)
    assert now.variance == pytest.approx(float(((grid - mean) ** 2 * density).sum()), abs=1e-6)
    assert heard(None, rise, stderr) == Level(rise, stderr**2)


def test_the_worst_is_the_highest_upper_estimate() -> None:
    assert worst_upper([Level(0.5, 0.0), Level(0.3, 0.16)]) == pytest.approx(0.3 + Z * 0.4)
    assert worst_upper([]) == -math.inf


@pytest.mark.parametrize(("budget", "noise"), [(0.2, 0.0), (0.06, 0.0), (0.08, 0.1), (0.6, 0.0)])
def test_on_two_quadratic_losses_it_finds_an_anchor_that_keeps_the_budget(
    budget: float, noise: float
) -> None:
    """Training runs to its fixed point between checks; the lesson's optimum is a rise of 1/2."""
    tasks = TwoTasks(np.zeros(2), np.array([1.0, 0.0]), np.eye(2), np.eye(2))
    random = np.random.default_rng(0)
    x, level, seen = 0.0, None, []
    for _ in range(80):
        at = fixed_point(tasks, Pull(kl_anchor=strengths(x).weight))
        rise = tasks.pretraining_rise(at) / budget
        level = heard(level, rise + noise * random.standard_normal(), max(noise, 1e-3))
        x = moved(x, worst_upper([level]))
        seen.append(rise)
    settled = seen[-20:]
    assert max(settled) <= 1.0 + noise
    # not given away either, unless the anchor is as loose as it gets
    assert min(settled) >= SLACK - Z * 2 * max(noise, DRIFT * noise) - 0.05 or x == LOW


@given(BUDGETS, st.floats(0, 1), st.floats(0, 1))
def test_drawing_back_leaves_what_may_stand_and_never_takes_more_than_half(
    worst: float, to_fall: float, to_come: float
) -> None:
    """By the square law; nothing while the rate is high, nor when no steps learn it again."""
    kept = drawn_back(worst, to_fall, to_come)
    assert BACK_LEAST <= kept <= 1
    if to_fall > LATE or to_come < ENDING or worst <= 1 + REPAIRED * to_fall:
        assert kept == 1
    elif kept > BACK_LEAST:
        assert worst * kept**2 == pytest.approx(1 + REPAIRED * to_fall)


@given(st.floats(-5, 50), st.floats(0, 9), st.floats(0.01, 1))
def test_a_belief_scales_as_the_rise_does(mean: float, variance: float, way: float) -> None:
    """Mean and standard error by the square of the way."""
    one, scaled = Level(mean, variance), Level(mean, variance).scaled(way)
    assert scaled.upper == pytest.approx(one.upper * way**2)
    assert scaled.lower == pytest.approx(one.lower * way**2)
