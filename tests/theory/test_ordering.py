"""Levers at equal task loss: against an optimizer, formulas by hand, and known special cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_pairs import drawn, spd
from scipy import linalg, optimize

from holdfast.errors import RequestError
from holdfast.theory import (
    LEVERS,
    Strengths,
    TwoTasks,
    fixed_point,
    forgetting_at,
    frontier,
    point_at,
    predicted_ordering,
    random_tasks,
)

SWEEP = {
    "replay": [0.0, 0.1, 0.5, 0.9],
    "kl_anchor": [0.0, 0.5, 2.0, 50.0],
    "l2_sp": [0.0, 0.1, 1.0, 10.0],
    "ewc": [0.0, 0.5, 2.0, 50.0],
    "low_rank": [4, 3, 2, 1],
    "budget": [100.0, 10.0, 1.0, 0.1],
    "rewind": [1.0, 0.7, 0.3, 0.0],
}
"""Each lever's strengths, from letting go to holding fast."""

seeds = st.integers(0, 2**32 - 1)


def test_every_lever_ties_on_the_textbook_case():
    """The optima differ along one eigenvector of both losses: there is one line to move on."""
    ordering = predicted_ordering(0.125)
    assert [place.point.lever for place in ordering] == list(LEVERS)
    assert {place.place for place in ordering} == {1}
    assert [p.point.pretraining_rise for p in ordering] == pytest.approx([0.28125] * 7, rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(LEVERS))
def test_holding_faster_never_learns_more(seed, lever):
    tasks = drawn(seed, 4)
    points = frontier(lever, SWEEP[lever], tasks)
    losses = [point.task_loss for point in points]
    assert losses == sorted(losses)
    assert [point.strength for point in points] == SWEEP[lever]


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 5), st.floats(0.02, 0.98))
def test_no_lever_forgets_less_than_replay_or_kl(seed, n, learnt):
    """Both trace the Pareto front; its point found here by SLSQP, not by any lever."""
    tasks = drawn(seed, n)
    task_loss = (1 - learnt) * tasks.start
    least = optimize.minimize(
        tasks.pretraining_rise,
        tasks.theta_sft_N,
        method="SLSQP",
        jac=lambda theta: tasks.F_NN @ (theta - tasks.theta_0_N),
        constraints={
            "type": "ineq",
            "fun": lambda theta: task_loss - tasks.task_loss(theta),
            "jac": lambda theta: -tasks.F_sft_NN @ (theta - tasks.theta_sft_N),
        },
        options={"ftol": 1e-12, "maxiter": 300},
    )
    slack = 1e-5 * tasks.pretraining_rise(tasks.theta_sft_N)
    for lever in LEVERS:
        point = point_at(lever, task_loss, tasks)
        assert point.task_loss == pytest.approx(task_loss, rel=1e-6)
        assert point.pretraining_rise >= least.fun - slack
        if lever in ("replay", "kl_anchor"):
            assert point.pretraining_rise == pytest.approx(least.fun, abs=slack)


@pytest.mark.parametrize("lever", [x for x in LEVERS if x != "low_rank"])
def test_the_strength_found_leads_to_the_point_found(lever):
    tasks = random_tasks(5, seed=4, fisher_noise=0.5)
    point = point_at(lever, 0.2 * tasks.start, tasks)
    (again,) = frontier(lever, [point.strength], tasks)
    assert again == point
    assert forgetting_at(lever, 0.2 * tasks.start, tasks) == point.pretraining_rise


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(0, 0.9), st.floats(0, 3))
def test_replay_and_kl_are_one_lever(seed, r, beta):
    """Only `(r + beta) / (1 - r)` counts for where training ends."""
    tasks = drawn(seed, 4)
    both = fixed_point(tasks, Strengths(replay=r, kl_anchor=beta))
    rho = (r + beta) / (1 - r)
    assert fixed_point(tasks, Strengths(kl_anchor=rho)) == pytest.approx(both, abs=1e-9)
    assert fixed_point(tasks, Strengths(replay=rho / (1 + rho))) == pytest.approx(both, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 5), st.floats(0.05, 0.95))
def test_alike_curvatures_make_rewinding_as_good_and_stopping_worse(seed, n, learnt):
    """The least rise is then `(sqrt(L_start) - sqrt(L))^2`, docs/theory.md."""
    tasks = drawn(seed, n, alike=True)
    task_loss = (1 - learnt) * tasks.start
    least = (math.sqrt(tasks.start) - math.sqrt(task_loss)) ** 2
    for lever in ("replay", "kl_anchor", "rewind"):
        assert forgetting_at(lever, task_loss, tasks) == pytest.approx(least, rel=1e-6)
    assert forgetting_at("budget", task_loss, tasks) > least * (1 + 1e-9)


def test_an_eigenvector_of_both_losses_makes_stopping_as_good_as_anything():
    """The gap between the optima spans one eigenvector; the curvatures differ otherwise."""
    q_NN = linalg.qr(np.random.default_rng(2).standard_normal((4, 4)))[0]
    tasks = TwoTasks(
        np.zeros(4),
        q_NN[:, 1],
        q_NN @ np.diag([4.0, 0.5, 1.0, 2.0]) @ q_NN.T,
        q_NN @ np.diag([1.0, 3.0, 2.0, 0.1]) @ q_NN.T,
    )
    tied = ["replay", "kl_anchor", "l2_sp", "budget", "rewind"]
    places = predicted_ordering(0.3 * tasks.start, tied, tasks)
    assert {place.place for place in places} == {1}


F_SFT_N = np.array([1.0, 0.3, 0.1])


@pytest.mark.parametrize(
    ("F_N", "budget", "l2_sp", "rewind"),
    [
        (np.ones(3), 1.03, 1.00, 1.41),
        (F_SFT_N, 1.35, 1.20, 1.00),
        (1 / F_SFT_N, 1.12, 1.36, 4.61),
    ],
    ids=["even", "alike", "opposite"],
)
def test_which_lever_is_near_the_front_depends_on_the_base(F_N, budget, l2_sp, rewind):
    """The table of docs/theory.md; by hand, from the share of each coordinate that is learnt."""
    tasks = TwoTasks(np.zeros(3), np.ones(3), np.diag(F_N), np.diag(F_SFT_N))

    def rise(learnt_share: Callable[[float], Any]) -> float:
        """Turn one number until 20 % of the lesson is left; the base's rise there."""
        x = optimize.brentq(
            lambda x: F_SFT_N @ (1 - learnt_share(x)) ** 2 - 0.2 * F_SFT_N.sum(), 1e-9, 100
        )
        return float(F_N @ learnt_share(x) ** 2 / 2)

    least = rise(lambda rho: F_SFT_N / (F_SFT_N + rho * F_N))
    by_hand = {
        "budget": rise(lambda t: 1 - np.exp(-t * F_SFT_N)),
        "l2_sp": rise(lambda weight: F_SFT_N / (F_SFT_N + weight)),
        "rewind": rise(lambda x: 1 / (1 + x) * np.ones(3)),
    }
    for lever, printed in (("budget", budget), ("l2_sp", l2_sp), ("rewind", rewind)):
        found = forgetting_at(lever, 0.2 * tasks.start, tasks)
        assert found == pytest.approx(by_hand[lever], rel=1e-6)
        assert round(found / least, 2) == printed


def test_ewc_with_the_exact_diagonal_is_kl_and_a_wrong_one_is_worse():
    F_NN = np.diag([3.0, 1.0, 0.2])
    right = TwoTasks(np.zeros(3), np.ones(3), F_NN, spd(np.random.default_rng(0), 3))
    wrong = replace(right, fisher_N=np.array([0.2, 1.0, 3.0]))
    task_loss = 0.25 * right.start
    least = forgetting_at("kl_anchor", task_loss, right)
    assert forgetting_at("ewc", task_loss, right) == pytest.approx(least, rel=1e-9)
    assert forgetting_at("ewc", task_loss, wrong) > 1.1 * least


def test_a_basis_that_cannot_reach_the_lesson_is_out_of_reach():
    tasks = TwoTasks(
        np.zeros(2), np.ones(2), np.eye(2), np.eye(2), basis_NR=np.array([[1.0], [0.0]])
    )
    assert forgetting_at("low_rank", 0.4, tasks) == math.inf  # half the lesson lies outside
    assert forgetting_at("low_rank", 0.6, tasks) == pytest.approx((1 - math.sqrt(0.2)) ** 2 / 2)
    last = predicted_ordering(0.4, tasks=tasks)[-1]
    assert (last.place, last.point.lever) == (7, "low_rank")


def test_a_lever_that_leaves_directions_free_is_read_at_its_strongest():
    """KL cannot hold a direction that the base does not feel, and it costs nothing there."""
    tasks = TwoTasks(np.zeros(2), np.ones(2), np.diag([1.0, 0.0]), np.eye(2))
    point = point_at("kl_anchor", 0.9, tasks)
    assert point.task_loss == pytest.approx(0.5, abs=1e-6)
    assert point.pretraining_rise == pytest.approx(0, abs=1e-12)


def test_places_are_shared_and_then_skipped():
    tasks = drawn(1, 3, alike=True)
    places = predicted_ordering(0.3 * tasks.start, ["budget", "rewind", "kl_anchor"], tasks)
    found = [(place.place, place.point.lever) for place in places]
    assert found == [(1, "rewind"), (1, "kl_anchor"), (3, "budget")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: frontier("kl", [1]), "lever: 'kl' is not one; "),
        (lambda: forgetting_at("replai", 0.1), "lever: 'replai' is not one; did you mean 'replay'"),
        (lambda: forgetting_at("replay", 1.0), "task_loss: 1 is not between 0 and the 0.78125"),
        (lambda: forgetting_at("replay", 0.0), "task_loss: 0 is not between"),
    ],
)
def test_bad_input_is_one_clear_line(wrong: Callable[[], Any], message: str):
    with pytest.raises(RequestError) as caught:
        wrong()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
