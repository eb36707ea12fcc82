"""Alarms: the e-process is a supermartingale, its state survives, its false alarms are rare.

Expected numbers come from the definition, one item at a time in plain Python, from exact
expectations over all outcomes, and from simulations at the edge of the null.
"""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.gate.sequential import (
    CAP,
    DECAY,
    PRIOR,
    Evidence,
    alarms,
    allowed_fall,
    fresh_blocks,
    reused_alarm,
    spent,
    update,
)

FALLS = st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=12)
BLOCKS = st.lists(FALLS, min_size=1, max_size=4)


def played(blocks: list[list[float]], margin: float, clip: float = 1.0) -> Evidence:
    evidence = Evidence()
    for block in blocks:
        evidence = update(evidence, block, [0.0] * len(block), margin=margin, clip=clip)
    return evidence


def by_hand(blocks: list[list[float]], margin: float, clip: float) -> tuple[float, float]:
    """Wealth and its peak, one item after the other, as the module's text defines them."""
    wealth = peak = 1.0
    memory: list[tuple[float, float]] = []  # (weight, fall)
    for block in blocks:
        for given_fall in block:
            fall = max(-clip, min(clip, given_fall))
            count = PRIOR + sum(w for w, _ in memory)
            mean = (PRIOR * margin + sum(w * d for w, d in memory)) / count
            prior = PRIOR * (margin**2 + clip**2 / 4)
            second = (prior + sum(w * d * d for w, d in memory)) / count
            spread = max(second - mean**2, 0) + (mean - margin) ** 2
            bet = min(max((mean - margin) / spread, 0.0), CAP / (clip + margin))
            wealth *= 1 + bet * (fall - margin)
            peak = max(peak, wealth)
            memory.append((1.0, fall))
        memory = [(w * DECAY, d) for w, d in memory]
    return wealth, peak


@given(BLOCKS, st.floats(0, 0.9), st.floats(1, 2))
@settings(max_examples=60, deadline=None)
def test_wealth_is_what_the_definition_says(
    blocks: list[list[float]], margin: float, clip: float
) -> None:
    found = played(blocks, margin, clip)
    wealth, peak = by_hand(blocks, margin, clip)
    assert math.isclose(math.exp(found.log_e), wealth, rel_tol=1e-6)
    assert math.isclose(math.exp(found.peak), peak, rel_tol=1e-6)
    assert found.items == sum(map(len, blocks))


@given(
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    st.floats(0.0, 0.3),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_the_expected_wealth_is_at_most_one_where_the_null_holds(
    weights: list[float], margin: float, sizes: list[int]
) -> None:
    """Exact: the mean over every sequence of falls of -1, 0, 1 whose mean is the margin."""
    total = sum(weights)
    odds = [w / total for w in weights]
    mean = odds[2] - odds[0]
    # moved onto the margin: mass from rises to falls, or the other way
    odds[2] += (margin - mean) / 2
    odds[0] -= (margin - mean) / 2
    if min(odds) < 0:
        odds = [(1 - margin) / 2, 0.0, (1 + margin) / 2]
    count = min(sum(sizes), 6)
    expected = 0.0
    for falls in itertools.product((-1.0, 0.0, 1.0), repeat=count):
        chance = math.prod(odds[int(fall) + 1] for fall in falls)
        rest, blocks = list(falls), []
        for size in sizes:
            blocks.append([rest.pop(0) for _ in range(min(size, len(rest)))])
        expected += chance * math.exp(played([b for b in blocks if b], margin).log_e)
    assert math.isclose(expected, 1.0, rel_tol=1e-9)  # a martingale where the mean is the margin


@given(BLOCKS, st.integers(0, 4), st.floats(0, 0.5))
@settings(max_examples=30, deadline=None)
def test_a_resumed_run_goes_on_exactly(blocks: list[list[float]], stop: int, margin: float) -> None:
    begun = played(blocks[:stop], margin)
    resumed = Evidence.from_dict(json.loads(json.dumps(begun.as_dict())))
    for block in blocks[stop:]:
        resumed = update(resumed, block, [0.0] * len(block), margin=margin)
    assert resumed == played(blocks, margin)


def test_no_false_alarm_over_probes_and_checks_beyond_alpha() -> None:
    """At the edge of the null (mean fall = margin), 12 probes x 25 checks, alpha 20 %."""
    rng, runs, alpha, margin = np.random.default_rng(0), 120, 0.2, 0.05
    names = [f"probe {k}" for k in range(12)]
    false = 0
    for _ in range(runs):
        watched = dict.fromkeys(names, Evidence())
        for _ in range(25):
            for name in names:
                fall = rng.choice([-1.0, 0.0, 1.0], size=20, p=[0.1, 0.75, 0.15])
                watched[name] = update(watched[name], fall, np.zeros(20), margin=margin)
        false += bool(alarms(watched, alpha))
    # 120 runs at 20 %: 24 expected at most, standard error 4.4; the bound is three above
    assert false <= 37


def test_a_real_fall_is_found_and_only_that() -> None:
    rng = np.random.default_rng(1)
    watched = {name: Evidence() for name in ("fallen", "late", "kept")}
    for check in range(12):
        for name in watched:
            falls = name == "fallen" or (name == "late" and check >= 6)
            fall = (rng.random(60) < (0.3 if falls else 0.0)).astype(float)
            watched[name] = update(watched[name], fall, np.zeros(60), margin=0.02)
        if check == 1:
            assert alarms(watched) == ("fallen",)
    assert set(alarms(watched)) == {"fallen", "late"}
    assert watched["kept"].log_e == 0.0  # nobody bets where no fall is in sight


def test_holm_lowers_the_bar_for_the_next_probe() -> None:
    first, second = math.log(3 / 0.05), math.log(2 / 0.05)
    watched = {
        "a": Evidence(peak=first),
        "b": Evidence(peak=second),
        "c": Evidence(peak=math.log(1 / 0.05) - 0.01),
    }
    assert alarms(watched) == ("a", "b")
    assert alarms(watched | {"a": Evidence(peak=first - 0.01)}) == ()


def test_a_value_that_is_no_number_is_an_alarm_for_good() -> None:
    evidence = update(Evidence(), [0.5, math.nan], [0.5, 0.5], margin=0.02)
    evidence = update(evidence, [0.5], [0.5], margin=0.02)
    assert evidence.broken
    assert alarms({"a": evidence, "b": Evidence()}) == ("a",)


def test_a_cluster_is_played_as_one_item() -> None:
    one = update(Evidence(), [1.0, 0.0, 1.0], [0.0] * 3, margin=0.1, clusters=["a", "a", "b"])
    assert one == update(Evidence(), [0.5, 1.0], [0.0] * 2, margin=0.1)
    with pytest.raises(ValueError, match="2 items but 1 clusters"):
        update(Evidence(), [1.0, 0.0], [0.0] * 2, margin=0.1, clusters=["a"])


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_fresh_blocks_share_nothing(clusters: list[str], size: int, seed: int) -> None:
    of = {str(i): cluster for i, cluster in enumerate(clusters)}
    blocks = fresh_blocks(list(of), size, clusters=of, seed=seed)
    assert sorted(i for block in blocks for i in block) == sorted(of)
    assert all(len(block) >= size for block in blocks) or len(blocks) == 1
    kinds = [{of[i] for i in block} for block in blocks]
    assert sum(map(len, kinds)) == len(set(clusters))
    assert blocks == fresh_blocks(list(of), size, clusters=of, seed=seed)


def test_alpha_is_spent_and_no_more() -> None:
    """The sum of 6 / (pi j)^2 over all j is 1 (Basel); its tail from n is about 6 / (pi^2 n)."""
    total = sum(spent(0.05, check) for check in range(1, 10_001))
    assert math.isclose(total + 0.05 * 6 / (math.pi**2 * 10_000), 0.05, rel_tol=1e-6)


def test_reused_items_raise_an_alarm_at_their_share_of_alpha() -> None:
    """40 of 200 fell, against a margin of 5 points: shown at once, not at a millionth of alpha."""
    before, after = np.ones(200), np.r_[np.zeros(28), np.ones(172)]
    assert reused_alarm(before, after, margin=0.05, check=1, probes=1)
    assert not reused_alarm(before, after, margin=0.05, check=1000, probes=50)
    assert not reused_alarm(before, before, margin=0.05, check=1, probes=1)


def test_what_cannot_be_is_refused() -> None:
    assert allowed_fall(2000) == 0.03
    with pytest.raises(ValueError, match="a margin lies in"):
        update(Evidence(), [1.0], [0.0], margin=1.0)
    with pytest.raises(ValueError, match="not the evidence of an alarm"):
        Evidence.from_dict({"log_e": 0.0})
    with pytest.raises(ValueError, match="not the evidence of an alarm"):
        Evidence.from_dict(Evidence().as_dict() | {"peak": math.inf})
    with pytest.raises(ValueError, match="alpha must lie"):
        alarms({}, alpha=0.7)
