"""The gate's statistics against independent computations, published values and simulations."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.linalg import sqrtm

from holdfast.gate.stats import (
    Verdict,
    items_needed,
    non_inferiority,
    paired_difference,
    stderr_of_mean,
    superiority,
    tango_bounds,
)

RANK = {Verdict.FAIL: 0, Verdict.INCONCLUSIVE: 1, Verdict.PASS: 2}
scores = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
losses = st.lists(
    st.tuples(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32)), min_size=2, max_size=20
)


def pairs_of(fell: int, rose: int, n: int) -> tuple[list[int], list[int]]:
    same = n - fell - rose
    return [1] * fell + [0] * rose + [1] * same, [0] * fell + [1] * rose + [1] * same


# --- Tango ---------------------------------------------------------------------------------------


def brute_force_score(fell: int, rose: int, n: int, delta: float) -> float:
    """Tango's statistic, its nuisance parameter by numerical maximisation of the likelihood."""

    def minus_loglik(q: float) -> float:
        terms = ((fell, q), (rose, q + delta), (n - fell - rose, 1 - 2 * q - delta))
        return -sum(count * math.log(p) for count, p in terms if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    found = optimize.minimize_scalar(
        minus_loglik, bounds=(low + 1e-13, high - 1e-13), method="bounded", options={"xatol": 1e-13}
    )
    variance = 2 * found.x + delta * (1 - delta)
    return (rose - fell - n * delta) / math.sqrt(n * variance)


@pytest.mark.parametrize(
    ("fell", "rose", "n"), [(7, 1, 21), (0, 1, 44), (12, 3, 60), (3, 9, 400), (5, 5, 30)]
)
@pytest.mark.parametrize("alpha", [0.025, 0.05, 0.2])
def test_tango_bounds_solve_the_score_equation(fell, rose, n, alpha):
    z = stats.norm.isf(alpha)
    lower, upper = tango_bounds(fell, rose, n, alpha)
    assert brute_force_score(fell, rose, n, lower) == pytest.approx(z, abs=2e-3)
    assert brute_force_score(fell, rose, n, upper) == pytest.approx(-z, abs=2e-3)


def test_tango_published_example():
    """Airway hyper-responsiveness, Fagerland, Lydersen & Laake 2014 (Stat Med 33:2850), table of
    95 % intervals: 21 pairs, 1 against 7 discordant, Tango's interval (-0.517, -0.026).
    """
    assert tango_bounds(7, 1, 21, 0.025) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize("n", [1, 10, 200, 100_000])
def test_tango_without_discordant_pairs_has_its_closed_form(n):
    z2 = stats.norm.isf(0.05) ** 2
    assert tango_bounds(0, 0, n, 0.05) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-6)


@pytest.mark.parametrize("n", [1, 5, 50])
def test_tango_where_everything_changed_keeps_its_side_open(n):
    lower, upper = tango_bounds(n, 0, n, 0.05)
    assert lower == -1
    assert -1 < upper < 1
    assert tango_bounds(0, n, n, 0.05) == (-upper, 1)


def test_same_answers_are_never_an_interval_of_zero_width():
    difference = paired_difference([1] * 50, [1] * 50, bounded=True)
    assert difference.lower < 0 < difference.upper
    assert difference.stderr > 0
    assert non_inferiority(difference, 0.02) is Verdict.INCONCLUSIVE
    assert non_inferiority(paired_difference([1] * 150, [1] * 150, bounded=True), 0.02) == "PASS"


# --- t and clusters ------------------------------------------------------------------------------


def test_paired_t_equals_scipy_where_nothing_is_skewed():
    rng = np.random.default_rng(0)
    half = rng.normal(0, 1, 15)
    x, y = np.zeros(30), 0.1 + np.concatenate([half, -half])
    difference = paired_difference(x, y, alpha=0.05)
    reference = stats.ttest_rel(y, x).confidence_interval(0.90)
    assert (difference.lower, difference.upper) == pytest.approx(tuple(reference), rel=1e-6)
    assert difference.stderr == pytest.approx(stats.sem(y - x), rel=1e-12)
    assert (difference.n, difference.clusters) == (30, 30)


def hall(sums: np.ndarray, quantile: float) -> float:
    """The T at which Hall's statistic, as it is written in the paper, is the quantile."""
    a = stats.skew(sums) / math.sqrt(len(sums))
    forward = lambda T: T + a * T**2 / 3 + a**2 * T**3 / 27 + a / 6 - quantile  # noqa: E731
    return float(optimize.brentq(forward, -1e3, 1e3, xtol=1e-12))


@given(st.integers(0, 10**6), st.integers(4, 60), st.sampled_from([0.01, 0.05, 0.2]))
def test_skewed_bounds_solve_halls_equation_and_are_never_inside_those_of_t(seed, n, alpha):
    d = np.random.default_rng(seed).gamma(0.7, 1, n)
    found = paired_difference(np.zeros(n), d, alpha=alpha)
    t, sem = stats.t(n - 1).isf(alpha), stats.sem(d)
    assert found.lower == pytest.approx(d.mean() - sem * max(t, hall(d, t)), rel=1e-6, abs=1e-9)
    assert found.upper == pytest.approx(d.mean() - sem * min(-t, hall(d, -t)), rel=1e-6, abs=1e-9)


def test_clustered_errors_equal_a_sandwich_written_by_hand():
    """CR2 of a regression on a constant, with its matrices (Bell & McCaffrey 2002, eq. 8)."""
    rng = np.random.default_rng(1)
    clusters = [f"doc{k}" for k in rng.integers(0, 9, 60)]
    shift = defaultdict(rng.normal)
    d = np.array([shift[c] + rng.normal() for c in clusters])
    e, hat = d - d.mean(), np.full((60, 60), 1 / 60)
    sums = []
    for one in dict.fromkeys(clusters):
        here = np.flatnonzero(np.array(clusters) == one)
        inverse = np.linalg.inv(np.eye(len(here)) - hat[np.ix_(here, here)])
        sums.append(float((sqrtm(inverse).real @ e[here]).sum()))
    stderr = math.sqrt(sum(one**2 for one in sums)) / 60
    difference = paired_difference(np.zeros(60), d, clusters=clusters, alpha=0.1)
    assert difference.stderr == pytest.approx(stderr, rel=1e-9)
    sizes = Counter(clusters).values()
    degrees = sum(n**2 for n in sizes) ** 2 / sum(n**4 for n in sizes) - 1
    t = stats.t(degrees).isf(0.1)
    reach = max(t, hall(np.array(sums), t)) * stderr
    assert difference.lower == pytest.approx(d.mean() - reach, rel=1e-9)
    assert stderr_of_mean(d, clusters) == pytest.approx(stderr, rel=1e-9)


@pytest.mark.parametrize("largest", [40, 200])
def test_where_one_cluster_is_most_of_the_items_nothing_is_decided(largest):
    """99 items and one cluster of as many: its own change could be anything."""
    clusters = [*map(str, range(99)), *["text"] * largest]
    d = np.array([0.3, -0.3, 0.1] * 33 + [0.1] * largest)
    found = paired_difference(np.zeros(len(d)), d, clusters=clusters)
    assert found.lower < -10
    assert found.upper > 10
    assert non_inferiority(found, 0.5) is Verdict.INCONCLUSIVE
    graded = paired_difference(np.full(len(d), 0.5), 0.5 + d, clusters=clusters, bounded=True)
    assert (graded.lower, graded.upper) == (-1, 1)


def test_duplicating_every_item_within_its_cluster_adds_no_certainty():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=20), rng.normal(size=20)
    once = paired_difference(x, y)
    twice = paired_difference(
        np.repeat(x, 2), np.repeat(y, 2), clusters=[str(i // 2) for i in range(40)]
    )
    assert (twice.lower, twice.upper) == pytest.approx((once.lower, once.upper), rel=1e-12)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([1] * 40, [1] * 40),
        ([1, 0] * 20, [0, 1] * 20),  # every cluster one up, one down: no spread, but change
        ([1] * 40, [1] * 38 + [0] * 2),
        ([1] * 40, [0] * 40),
    ],
)
def test_few_changed_clusters_never_narrow_the_interval_to_nothing(before, after):
    clusters = [str(i // 2) for i in range(40)]
    difference = paired_difference(before, after, clusters=clusters, bounded=True)
    alone = tango_bounds(0, 0, 20, 0.05)
    assert difference.upper - difference.lower >= alone[1]
    assert difference.lower <= difference.estimate <= difference.upper
    assert difference.stderr > 0
    assert "Tango on clusters" in difference.method


def test_no_change_in_clusters_counts_clusters_not_items():
    clusters = [str(i // 10) for i in range(200)]
    difference = paired_difference([1] * 200, [1] * 200, clusters=clusters, bounded=True)
    assert (difference.lower, difference.upper) == pytest.approx(tango_bounds(0, 0, 20, 0.05))


def test_one_large_cluster_is_not_many():
    clusters = ["big"] * 91 + [str(i) for i in range(9)]
    difference = paired_difference([1] * 100, [1] * 100, clusters=clusters, bounded=True)
    assert difference.lower < tango_bounds(0, 0, 10, 0.05)[0]


def test_losses_equal_to_the_bit_are_the_same_model():
    difference = paired_difference([-2.5, -1.25], [-2.5, -1.25])
    assert (difference.lower, difference.upper) == (0, 0)
    assert non_inferiority(difference, 0.01) is Verdict.PASS
    assert superiority(difference) is Verdict.FAIL


def test_a_single_document_decides_nothing():
    difference = paired_difference([-2.0, -3.0], [-2.0, -3.0], clusters=["a", "a"])
    assert (difference.lower, difference.upper) == (-math.inf, math.inf)
    assert non_inferiority(difference, 100) is Verdict.INCONCLUSIVE
    bounded = paired_difference([1, 1], [0, 0], clusters=["a", "a"], bounded=True)
    assert (bounded.lower, bounded.upper) == (-1, 1)


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bounded", [True, False])
def test_values_that_are_not_finite_fail(bad, side, bounded):
    values = [[1.0] * 500, [1.0] * 500]
    values[side][3] = bad
    difference = paired_difference(*values, bounded=bounded)
    assert non_inferiority(difference, 1e9) is Verdict.FAIL
    assert superiority(difference) is Verdict.FAIL
    assert items_needed(difference, 0.1) is None


def test_no_items_fail():
    assert non_inferiority(paired_difference([], []), 1.0) is Verdict.FAIL


def test_malformed_calls_are_refused():
    with pytest.raises(ValueError, match="one length"):
        paired_difference([1, 2], [1])
    with pytest.raises(ValueError, match="2 items but 1 clusters"):
        paired_difference([1, 2], [1, 2], clusters=["a"])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        paired_difference([0.5], [1.5], bounded=True)
    with pytest.raises(ValueError, match="alpha"):
        paired_difference([1, 2], [1, 2], alpha=0.5)
    with pytest.raises(ValueError, match="margin"):
        non_inferiority(paired_difference([1, 2], [1, 2]), math.nan)


@given(losses, st.floats(0, 3), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_wider_margin_never_makes_the_verdict_worse(pairs, one, other):
    x, y = zip(*pairs, strict=True)
    difference = paired_difference(x, y)
    narrow, wide = sorted((one, other))
    assert RANK[non_inferiority(difference, narrow)] <= RANK[non_inferiority(difference, wide)]


@given(scores, st.booleans())
@settings(max_examples=60, deadline=None)
def test_swapping_the_models_mirrors_the_interval(pairs, clustered):
    x, y = zip(*pairs, strict=True)
    clusters = [str(i // 3) for i in range(len(x))] if clustered else None
    there = paired_difference(x, y, clusters=clusters, bounded=True)
    back = paired_difference(y, x, clusters=clusters, bounded=True)
    assert (back.estimate, back.lower, back.upper) == pytest.approx(
        (-there.estimate, -there.upper, -there.lower), abs=1e-9
    )
    assert -1 <= there.lower <= there.estimate <= there.upper <= 1
    assert there.upper > there.lower


def test_superiority_has_three_verdicts():
    assert superiority(paired_difference(*pairs_of(0, 20, 40), bounded=True)) is Verdict.PASS
    assert superiority(paired_difference(*pairs_of(20, 0, 40), bounded=True)) is Verdict.FAIL
    assert superiority(paired_difference(*pairs_of(3, 4, 40), bounded=True)) == "INCONCLUSIVE"


# --- level and power -----------------------------------------------------------------------------


def false_passes(repeats: int, compare) -> None:
    """At a true fall of exactly the margin, PASS must come at most alpha of the time."""
    alpha = 0.05
    passed = sum(non_inferiority(*compare()) is Verdict.PASS for _ in range(repeats))
    assert passed / repeats <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / repeats)
    assert passed > 0  # a gate that never passes would hold any level


def test_level_for_scores():
    rng = np.random.default_rng(3)

    def compare():
        same = 250 - (fell := int(rng.binomial(250, 0.08)))
        rose = int(rng.binomial(same, 0.04 / 0.92))
        return paired_difference(*pairs_of(fell, rose, 250), bounded=True), 0.04

    false_passes(2000, compare)


def test_level_for_clustered_losses():
    rng = np.random.default_rng(4)
    clusters = [str(i // 4) for i in range(80)]

    def compare():
        d = -0.02 + np.repeat(rng.normal(0, 0.05, 20), 4) + rng.normal(0, 0.05, 80)
        return paired_difference(np.zeros(80), d, clusters=clusters), 0.02

    false_passes(2000, compare)


def test_level_for_skewed_losses():
    """A few texts get much worse. Student's t alone would pass beyond its level here."""
    rng = np.random.default_rng(6)
    drawn = -rng.gamma(2, 0.05, (2000, 40))
    each = iter(drawn)
    false_passes(2000, lambda: (paired_difference(np.zeros(40), next(each)), 0.1))
    lower = drawn.mean(1) - stats.sem(drawn, axis=1) * stats.t(39).isf(0.05)
    assert (lower > -0.1).mean() > 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_ignoring_the_clusters_would_break_the_level():
    """The simulation above can fail: the same losses without their clusters pass too often."""
    rng = np.random.default_rng(4)
    passed = 0
    for _ in range(500):
        d = -0.02 + np.repeat(rng.normal(0, 0.05, 20), 4) + rng.normal(0, 0.05, 80)
        passed += non_inferiority(paired_difference(np.zeros(80), d), 0.02) is Verdict.PASS
    assert passed / 500 > 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)


def test_level_for_clusters_of_unlike_size():
    """60 clusters, the largest a tenth of all items; each falls whole at the rate of the margin."""
    rng = np.random.default_rng(10)
    sizes = np.maximum(1, rng.lognormal(1, 0.8, 60).round()).astype(int)
    clusters = [str(g) for g in np.repeat(np.arange(60), sizes)]

    def compare():
        u = np.repeat(rng.random(60), sizes)
        before, after = (u < 0.2) | (u > 0.6), (u > 0.2) & (u < 0.3) | (u > 0.6)
        return paired_difference(before, after, clusters=clusters, bounded=True), 0.1

    false_passes(1000, compare)


def test_level_for_clustered_scores_where_few_clusters_change():
    """Whole clusters fall, rarely: the plain cluster t, blind to what it has not seen yet, passes
    far too often here.
    """
    rng = np.random.default_rng(5)
    clusters = [str(i // 5) for i in range(300)]

    def compare():
        after = np.repeat((rng.random(60) > 0.05).astype(float), 5)
        return paired_difference(np.ones(300), after, clusters=clusters, bounded=True), 0.05

    false_passes(2000, compare)


def test_items_needed_agrees_with_the_textbook_sizes():
    """One-sided 5 %, power 80 %: sd 0.05 and margin 0.02 need 39 documents; 10 % discordance and
    2 points need n = 0.1 (1.645 + 0.842)^2 / 0.02^2 = 1546 items.
    """
    d = np.tile([0.05, -0.05], 50) * math.sqrt(99 / 100)
    assert items_needed(paired_difference(np.zeros(100), d), 0.02) == 39
    difference = paired_difference(*pairs_of(500, 500, 10_000), bounded=True)
    assert items_needed(difference, 0.02) == pytest.approx(1546, rel=0.01)


def test_items_needed_cannot_always_be_told():
    still = paired_difference([-1.0, -2.0], [-1.0, -2.0])
    assert items_needed(still, 0.1) is None
    assert items_needed(paired_difference([1.0], [2.0]), 0.1) is None
    moved = paired_difference([0.0, 0.0], [0.0, 1.0])
    assert items_needed(moved, -0.5) is None


# --- one reading ---------------------------------------------------------------------------------


def test_stderr_of_a_mean():
    values = [0.5, 1.5, 4.0, 2.25]
    assert stderr_of_mean(values) == pytest.approx(stats.sem(values), rel=1e-12)
    assert math.isnan(stderr_of_mean([1.5]))
    assert math.isnan(stderr_of_mean([]))
    assert math.isnan(stderr_of_mean([1.0, math.nan]))


@pytest.mark.parametrize("value", [0, 1])
def test_stderr_of_all_right_or_all_wrong_is_wilsons(value):
    interval = stats.binomtest(value * 30, 30).proportion_ci(0.95, method="wilson")
    expected = (interval.high - interval.low) / 2 / stats.norm.isf(0.025)
    assert stderr_of_mean([value] * 30) == pytest.approx(expected, rel=1e-9)
    clusters = [str(i // 3) for i in range(30)]
    assert stderr_of_mean([value] * 30, clusters) > stderr_of_mean([value] * 30)
