"""The comparison's own arithmetic, against counting and against numpy on made-up cells."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "forgetting"
sys.path.insert(0, str(FOLDER))

import score  # noqa: E402

UNIT = st.floats(0, 1, allow_nan=False)


def cell(after: list[int], rise: float = 1.1) -> dict[str, Any]:
    """Made up: one old probe of ten right answers, one domain, one lesson."""
    return {
        "lesson": "verbs",
        "seed": 1,
        "left_out": ["b"],
        "probe": {
            "old": {"kind": "guardrail", "before": [1] * 10, "after": [1] * 7 + [0] * 3},
            "lesson": {"kind": "target", "before": [0] * len(after), "after": after},
        },
        "canary": {
            "a": {"kind": "", "before": [1.0, 2.0], "after": [1.0, 2.0]},
            "b": {"kind": "", "before": [1.0, 1.0], "after": [rise, rise]},
        },
    }


def test_the_figures_of_a_cell_are_those_counted_by_hand():
    found = score.point(cell([1, 1, 0, 1]))
    assert found == pytest.approx(
        {
            "gain": 0.75,
            "worst rise": 0.1,
            "mean rise": 0.05,
            "worst fall": 0.3,
            "mean fall": 0.3,
            "lost": 0.3,
            "won": 0.0,
            "left out rise": 0.1,
            "replayed rise": 0.0,
        }
    )


@given(st.lists(st.tuples(UNIT, st.floats(0, 0.3)), max_size=6))
def test_hypervolume_is_the_share_of_a_grid_that_some_point_dominates(points):
    gains, rises = np.meshgrid(
        (np.arange(200) + 0.5) / 200, (np.arange(200) + 0.5) / 200 * score.REFERENCE[1]
    )
    dominated = np.zeros_like(gains, dtype=bool)
    for g, r in points:
        dominated |= (gains <= g) & (rises >= r)
    assert score.hypervolume(points) == pytest.approx(dominated.mean(), abs=0.02)


def test_holm_on_the_textbook_example():
    # Holm 1979 by hand: 4 x 0.01, 3 x 0.013, 2 x 0.04, the largest never below those before it
    found = score.holm({"a": 0.01, "b": 0.04, "c": 0.013, "d": 0.5})
    assert found == pytest.approx({"a": 0.04, "c": 0.04, "b": 0.08, "d": 0.5})


def test_the_interval_covers_the_mean_of_fresh_cells_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        cells = [cell(list(rng.binomial(1, 0.6, 60))) for _ in range(8)]
        low, high = score.interval(cells, seed=trial, draws=200)["gain"]
        covered += low <= 0.6 <= high
    assert covered >= 50  # 95 % of 60 is 57; below 50 has probability under 0.001


def test_equal_arms_do_not_differ_and_unlike_ones_do():
    good, bad = [cell([1] * 30)] * 3, [cell([1] * 10 + [0] * 20)] * 3
    assert score.differs(good, good, lambda f: f["gain"], draws=200)[1] == 1.0
    mean, p = score.differs(good, bad, lambda f: f["gain"], draws=200)
    assert mean == pytest.approx(2 / 3, abs=0.05)
    assert p <= 0.02


def test_forgotten_is_the_worst_of_what_was_lost_and_utility_what_is_left_of_the_gain():
    figures = score.point(cell([1, 1]))
    assert score.forgotten(figures) == pytest.approx(0.3)  # the fall; the rise is 0.1
    assert score.utility(figures) == pytest.approx(1 - 0.3)
    assert score.utility(score.point(cell([1, 1], rise=9.0))) == 0.0  # more than all is all
    assert score.forgotten(figures | {"kept": 0.4}) == pytest.approx(0.6)


def rate(times: float, right: int, rise: float, *, arm: str = "full", seed: int = 100) -> Any:
    """A cell at some rate with `right` of 20 lesson items right."""
    named = {"rate": times, "arm": arm, "seed": seed}
    return cell([1] * right + [0] * (20 - right), rise) | named


def test_of_the_rates_that_learn_enough_the_one_that_forgets_least_is_chosen():
    broken = {"rate": 4.0, "arm": "full", "seed": 100, "failed": "why"}
    full = [rate(1.0, 10, 1.5), rate(2.0, 19, 1.9), rate(3.0, 20, 2.5), broken]
    assert score.enough(full) == pytest.approx(0.9)
    assert score.chosen(full, "full")["rate"] == 2.0
    assert score.least_forgotten(full, "full", 0.99)["rate"] == 3.0
    weak = [rate(1.0, 2, 1.0, arm="weak"), rate(2.0, 9, 1.2, arm="weak")]
    assert score.chosen([*full, *weak], "weak")["rate"] == 2.0  # none is enough: the most learned
    assert not score.learned_enough([*full, *weak], "weak")
    assert score.chosen(full, "absent") is None
    later = [rate(2.0, 18, 1.9, seed=2), rate(2.0, 17, 1.9, seed=1), rate(3.0, 20, 1.9, seed=1)]
    assert [one["seed"] for one in score.tested([*full, *later], "full")] == [1, 2]


def test_a_sequence_is_judged_by_both_lessons_and_by_what_the_second_left_of_the_first():
    both = cell([1, 0]) | {"lesson": "a+b", "after_first_stage": 0.8, "target": {"a": 0.6, "b": 0}}
    both["probe"]["first"] = {"kind": "target", "before": [0] * 2, "after": [1, 1]}
    assert score.point(both)["gain"] == pytest.approx(0.75)
    assert score.kept(both) == pytest.approx(0.75)
    assert score.kept(both | {"after_first_stage": 0.0}) == 1.0
    assert score.kept(cell([1])) is None
