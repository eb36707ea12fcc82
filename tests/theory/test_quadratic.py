"""The quadratic model: closed forms against walked paths, other solvers, and the printed digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_pairs import drawn
from scipy import integrate, linalg, optimize

from holdfast.errors import RequestError
from holdfast.theory import (
    EXAMPLE,
    REGIMES,
    Strengths,
    TwoTasks,
    descend,
    fixed_point,
    flow,
    frontier,
    gradient,
    random_tasks,
    simulate,
)

seeds = st.integers(0, 2**32 - 1)


strengths = st.builds(
    Strengths,
    replay=st.floats(0, 0.9),
    kl_anchor=st.floats(0, 3),
    l2_sp=st.floats(0, 1),
    ewc=st.floats(0, 1),
    rank=st.none() | st.integers(1, 2),
    rewind=st.floats(0, 1),
)


def training_loss(tasks: TwoTasks, levers: Strengths, theta_N: Any) -> float:
    """The loss of the module's docstring, written out here a second time."""
    from_base, from_sft = theta_N - tasks.theta_0_N, theta_N - tasks.theta_sft_N
    pre = from_base @ tasks.F_NN @ from_base / 2
    sft = from_sft @ tasks.F_sft_NN @ from_sft / 2
    penalty = levers.l2_sp * from_base @ from_base / 2
    penalty += levers.ewc * sum(f * d**2 for f, d in zip(tasks.fisher_N, from_base)) / 2  # noqa: B905
    return float((1 - levers.replay) * sft + (levers.replay + levers.kl_anchor) * pre + penalty)


# ---- the textbook case


@pytest.mark.parametrize(
    ("regime", "theta_1", "rise", "of_naive"),
    [
        ("naive", "2.500", "0.781", "100%"),
        ("replay", "2.250", "0.633", "81%"),
        ("kl_anchor", "1.667", "0.347", "44%"),
        ("both", "1.500", "0.281", "36%"),
    ],
)
def test_the_four_regimes_to_the_printed_digits(regime, theta_1, rise, of_naive):
    """Digits as the source of the textbook case prints them."""
    theta_N = fixed_point(EXAMPLE, REGIMES[regime])
    naive = EXAMPLE.pretraining_rise(fixed_point(EXAMPLE, Strengths()))
    risen = EXAMPLE.pretraining_rise(theta_N)
    assert theta_N[0] == pytest.approx(1, abs=1e-12)
    assert (f"{theta_N[1]:.3f}", f"{risen:.3f}", f"{risen / naive:.0%}") == (
        theta_1,
        rise,
        of_naive,
    )


@pytest.mark.parametrize("regime", REGIMES)
def test_the_four_regimes_exactly(regime):
    """Against the fixed point in fractions: `(1 - r) 2.5 / (1 + beta)` in theta[1]."""
    levers = REGIMES[regime]
    r, beta = Fraction(str(levers.replay)), Fraction(str(levers.kl_anchor))
    theta_1 = (1 - r) * Fraction(5, 2) / (1 + beta)
    theta_N = fixed_point(EXAMPLE, levers)
    assert theta_N[1] == pytest.approx(float(theta_1), rel=1e-12)
    rise, task = theta_1**2 / 8, (theta_1 - Fraction(5, 2)) ** 2 / 8
    assert EXAMPLE.pretraining_rise(theta_N) == pytest.approx(float(rise), rel=1e-12)
    assert EXAMPLE.task_loss(theta_N) == pytest.approx(float(task), rel=1e-9, abs=1e-15)
    if regime == "both":
        assert task == Fraction(1, 8)


# ---- fixed point and paths


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 6), strengths)
def test_the_fixed_point_minimises_the_training_loss(seed, n, levers):
    """Against scipy's BFGS on the loss written out in this file."""
    tasks = drawn(seed, n)
    U_NR = np.eye(n) if levers.rank is None else linalg.orth(tasks.basis_NR[:, : levers.rank])
    found = optimize.minimize(
        lambda z: training_loss(tasks, levers, tasks.theta_0_N + U_NR @ z),
        np.zeros(U_NR.shape[1]),
        method="BFGS",
        options={"gtol": 1e-7},
    )
    expected = tasks.theta_0_N + levers.rewind * (U_NR @ found.x)
    assert fixed_point(tasks, levers) == pytest.approx(expected, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 8), st.floats(0, 1), st.floats(0, 3))
def test_alike_curvatures_cancel_from_the_fixed_point(seed, n, r, beta):
    """`((1-r) theta_sft + (r+beta) theta_0) / (1+beta)`, whatever F is."""
    tasks = drawn(seed, n, alike=True)
    expected = ((1 - r) * tasks.theta_sft_N + (r + beta) * tasks.theta_0_N) / (1 + beta)
    found = fixed_point(tasks, Strengths(replay=r, kl_anchor=beta))
    assert found == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 8), strengths, st.floats(0.01, 0.99), st.integers(0, 200))
def test_descent_in_closed_form_is_descent_step_by_step(seed, n, levers, speed, steps):
    tasks = drawn(seed, n)
    lr = 2 * speed / largest_curvature(tasks, levers)
    path = simulate(tasks, levers, lr, steps)
    assert path.shape == (steps + 1, n)
    assert path[0] == pytest.approx(tasks.theta_0_N, abs=1e-12)
    for step in {0, steps // 2, steps}:
        assert descend(tasks, levers, lr, step) == pytest.approx(path[step], abs=1e-6)


def largest_curvature(tasks: TwoTasks, levers: Strengths) -> float:
    """Of the training loss, from differences of its gradient."""
    columns = [gradient(tasks, levers, row) for row in np.eye(len(tasks.theta_0_N))]
    at_zero = gradient(tasks, levers, np.zeros(len(tasks.theta_0_N)))
    return float(linalg.eigvalsh(np.array(columns) - at_zero)[-1])


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 5), strengths)
def test_simulation_ends_at_the_fixed_point(seed, n, levers):
    tasks = drawn(seed, n)
    lr = 1 / largest_curvature(tasks, levers)
    end_N = simulate(tasks, levers, lr, 1500)[-1]
    assert end_N == pytest.approx(fixed_point(tasks, levers), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 5), strengths, st.floats(0, 20))
def test_flow_solves_its_differential_equation(seed, n, levers, time):
    """Against scipy's matrix exponential of the affine map, and its Runge-Kutta."""
    tasks = drawn(seed, n)
    U_NR = np.eye(n) if levers.rank is None else linalg.orth(tasks.basis_NR[:, : levers.rank])
    project = U_NR @ U_NR.T
    zero = gradient(tasks, levers, np.zeros(n))
    A_NN = np.array([gradient(tasks, levers, row) - zero for row in np.eye(n)]).T
    affine = np.zeros((n + 1, n + 1))
    affine[:n, :n], affine[:n, n] = -project @ A_NN, -project @ zero
    reached = (linalg.expm(time * affine) @ np.append(tasks.theta_0_N, 1))[:n]
    expected = tasks.theta_0_N + levers.rewind * (reached - tasks.theta_0_N)
    assert flow(tasks, levers, time) == pytest.approx(expected, abs=1e-8)


def test_flow_against_runge_kutta_and_small_steps():
    tasks, levers = drawn(5, 4), Strengths(replay=0.2, ewc=0.3)
    walked = integrate.solve_ivp(
        lambda _, theta: -gradient(tasks, levers, theta),
        (0, 3),
        tasks.theta_0_N,
        rtol=1e-10,
        atol=1e-12,
    )
    reached = flow(tasks, levers, 3)
    assert reached == pytest.approx(walked.y[:, -1], abs=1e-7)
    assert descend(tasks, levers, 3e-5, 100_000) == pytest.approx(reached, abs=1e-4)


def test_gradient_is_the_slope_of_the_training_loss():
    """Central differences; exact for a quadratic but for rounding."""
    tasks, levers = drawn(3, 5), Strengths(0.3, 0.7, 0.2, 0.4)
    theta_N, h = np.arange(5.0), 1e-3
    slopes = [
        (
            training_loss(tasks, levers, theta_N + h * row)
            - training_loss(tasks, levers, theta_N - h * row)
        )
        / (2 * h)
        for row in np.eye(5)
    ]
    assert gradient(tasks, levers, theta_N) == pytest.approx(slopes, abs=1e-8)


def test_directions_without_curvature_are_left_alone():
    """A singular lesson: what it does not see stays where it was, at any time."""
    tasks = TwoTasks(np.zeros(3), np.ones(3), np.eye(3), np.diag([1.0, 0.25, 0.0]))
    naive = Strengths()
    assert fixed_point(tasks, naive) == pytest.approx([1, 1, 0])
    assert flow(tasks, naive, 1e6) == pytest.approx([1, 1, 0])
    assert descend(tasks, naive, 1.5, 7) == pytest.approx(simulate(tasks, naive, 1.5, 7)[-1])


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_a_lesson_of_few_directions_moves_in_those_alone(seed):
    """Rank 3 of 6, in random directions: numpy's least-norm solution, and the walked path."""
    rng = np.random.default_rng(seed)
    root_NR = linalg.qr(rng.standard_normal((6, 3)), mode="economic")[0] * [1.0, 0.7, 0.4]
    F_sft_NN, theta_N = root_NR @ root_NR.T, rng.standard_normal(6)
    tasks = TwoTasks(np.zeros(6), theta_N, np.eye(6), F_sft_NN)
    least_N = np.linalg.lstsq(F_sft_NN, F_sft_NN @ theta_N, rcond=1e-9)[0]
    assert fixed_point(tasks, Strengths()) == pytest.approx(least_N, abs=1e-9)
    assert flow(tasks, Strengths(), 1e9) == pytest.approx(least_N, abs=1e-9)
    walked_N = simulate(tasks, Strengths(), 1.5, 40)[-1]
    assert descend(tasks, Strengths(), 1.5, 40) == pytest.approx(walked_N, abs=1e-9)


def test_without_any_curvature_nothing_moves():
    tasks = TwoTasks(np.zeros(2), np.ones(2), np.eye(2), np.zeros((2, 2)))
    for end_N in (
        fixed_point(tasks, Strengths()),
        flow(tasks, Strengths(), 5),
        descend(tasks, Strengths(), 0.1, 5),
    ):
        assert np.array_equal(end_N, np.zeros(2))


def test_a_low_rank_path_stays_in_its_subspace():
    tasks = drawn(11, 6)
    spanned = np.linalg.matrix_rank(
        np.column_stack(
            [
                tasks.basis_NR[:, :2],
                (simulate(tasks, Strengths(rank=2), 0.1, 50) - tasks.theta_0_N).T,
            ]
        ),
        tol=1e-9,
    )
    assert spanned == 2


def test_draws_are_reproducible_and_share_what_is_not_asked_to_change():
    one, two = (random_tasks(6, seed=3, overlap=x, fisher_noise=x) for x in (0.0, 1.0))
    again = random_tasks(6, seed=3, overlap=0.0)
    assert np.array_equal(one.F_sft_NN, again.F_sft_NN)
    assert np.array_equal(one.F_NN, two.F_NN)
    assert np.array_equal(one.theta_sft_N, two.theta_sft_N)
    assert not np.array_equal(one.F_NN, random_tasks(6, seed=4).F_NN)
    assert np.array_equal(two.F_sft_NN, two.F_NN)
    assert not np.allclose(one.F_sft_NN, one.F_NN)
    assert np.array_equal(one.fisher_N, np.diag(one.F_NN))
    assert not np.allclose(two.fisher_N, one.fisher_N)
    assert np.linalg.eigvalsh(one.F_NN) == pytest.approx([1 / k for k in range(6, 0, -1)])


# ---- bad input

EYE = np.eye(2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: TwoTasks(np.zeros(2), np.zeros(3), EYE, EYE), "theta_sft: has shape (3,); give"),
        (lambda: TwoTasks(np.zeros(2), np.ones(2), np.eye(3), EYE), "F: has shape (3, 3); give"),
        (lambda: TwoTasks(np.zeros(2), np.ones(2), EYE, [[1, 1], [0, 1]]), "F_sft: is not symm"),
        (lambda: TwoTasks(np.zeros(2), np.ones(2), EYE, -EYE), "F_sft: has the negative curv"),
        (lambda: TwoTasks(np.zeros(2), [1, np.nan], EYE, EYE), "theta_sft: holds a value that is"),
        (lambda: TwoTasks(np.zeros(2), ["a", "b"], EYE, EYE), "theta_sft: not numbers"),
        (lambda: replace(EXAMPLE, fisher_N=[-1.0, 1.0]), "fisher: an entry is negative"),
        (lambda: replace(EXAMPLE, basis_NR=np.ones((2, 2))), "basis: its columns are linearly"),
        (lambda: replace(EXAMPLE, basis_NR=np.ones((2, 3))), "basis: its columns are linearly"),
        (lambda: Strengths(replay=1.5), "replay: 1.5 is not allowed; give a number from 0 to 1"),
        (lambda: Strengths(kl_anchor=-1), "kl_anchor: -1 is not allowed; give a number of at"),
        (lambda: Strengths(l2_sp=math.nan), "l2_sp: nan is not allowed"),
        (lambda: Strengths(ewc=math.inf), "ewc: inf is not allowed"),
        (lambda: frontier("low_rank", [3]), "low_rank: 3 is not a rank of this basis; give 1 to 2"),
        (lambda: frontier("low_rank", [0.5]), "low_rank: 0.5 is not a rank"),
        (lambda: flow(EXAMPLE, Strengths(), -1), "time: -1 is not allowed"),
        (lambda: descend(EXAMPLE, Strengths(), 0.8, 3), "lr: 0.8 diverges on these losses; give "),
        (lambda: simulate(EXAMPLE, Strengths(), 0.0, 3), "lr: 0.0 is not allowed"),
        (lambda: descend(EXAMPLE, Strengths(), 0.1, -1), "steps: -1 is not allowed"),
        (lambda: random_tasks(0, seed=0), "dim: 0 is too few"),
        (lambda: random_tasks(2, seed=0, overlap=2), "overlap: 2 is not a share"),
        (lambda: random_tasks(2, seed=0, fisher_noise=-1), "fisher_noise: -1 is not allowed"),
    ],
)
def test_bad_input_is_one_clear_line(wrong: Callable[[], Any], message: str):
    with pytest.raises(RequestError) as caught:
        wrong()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_rate_that_is_named_works():
    """EXAMPLE's steepest curvature is 2.5, so 2 / 2.5 = 0.8 is the limit."""
    with pytest.raises(RequestError, match=r"less than 0\.8, such as 0\.4$"):
        descend(EXAMPLE, Strengths(), 5.0, 3)
    assert descend(EXAMPLE, Strengths(), 0.4, 1000) == pytest.approx([1, 2.5])
