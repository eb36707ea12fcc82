"""What each lever forgets at an equal amount of learning, and the levers' predicted order.

Everything here reads the closed forms of `quadratic.py`; docs/theory.md says what to make of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from holdfast.errors import RequestError, did_you_mean
from holdfast.theory.quadratic import EXAMPLE, Array, Strengths, TwoTasks, fixed_point, flow

LEVERS = ("replay", "kl_anchor", "l2_sp", "ewc", "low_rank", "budget", "rewind")
"""What `frontier`, `forgetting_at` and `predicted_ordering` know; named as in a recipe."""


@dataclass(frozen=True)
class Point:
    """Where one lever at one strength ends."""

    lever: str
    strength: float
    """In the lever's own unit, see `frontier`; nan where it cannot get there."""
    task_loss: float
    pretraining_rise: float
    """The forgetting; inf where the lever cannot get there."""


@dataclass(frozen=True)
class Place:
    """A lever's place among others; levers that tie share the best of their places."""

    place: int
    point: Point


def frontier(lever: str, strengths: Iterable[float], tasks: TwoTasks = EXAMPLE) -> list[Point]:
    """Where training with this lever alone ends, for each strength.

    The strength is the field of `Strengths` of that name, and for `low_rank` the rank: more forgets
    less, except for `low_rank`, `budget` (lr x steps of gradient flow) and `rewind` (scale), where
    less does. All end at `fixed_point` but `budget`, which ends at `flow`.
    """
    return [_point(lever, strength, tasks) for strength in strengths]


def forgetting_at(lever: str, task_loss: float, tasks: TwoTasks = EXAMPLE) -> float:
    """Rise of the base's loss when this lever alone learns the lesson down to `task_loss`.

    inf where it cannot learn that much. See `point_at`.
    """
    return point_at(lever, task_loss, tasks).pretraining_rise


def point_at(lever: str, task_loss: float, tasks: TwoTasks = EXAMPLE) -> Point:
    """The strength at which this lever alone ends at `task_loss`, and what it forgets there.

    Every lever but one is turned until it fits; the lesson's loss falls steadily as it is let go.
    Ranks are whole numbers: the smallest rank that can learn as much is trained until it has, then
    stopped. A lever whose strongest setting still learns more (it leaves some directions free) is
    read there.

    Raises:
        RequestError: `task_loss` does not lie between 0 and the loss at the start.
    """
    _check_lever(lever)
    if not 0 < task_loss < tasks.start:
        raise RequestError(
            f"task_loss: {task_loss:g} is not between 0 and the {tasks.start:g} at the start; "
            f"give one that is, such as {tasks.start / 2:g}"
        )
    rank = None
    if lever == "low_rank":
        ranks = range(1, tasks.basis_NR.shape[1] + 1)
        able = (k for k in ranks if _point(lever, k, tasks).task_loss < task_loss)
        rank = next(able, None)
        if rank is None:
            return Point(lever, math.nan, math.nan, math.inf)

    def at(x: float) -> Point:
        if rank is None:
            return _point(lever, _turned(lever, x, tasks), tasks)
        theta_N = flow(tasks, Strengths(rank=rank), _turned("budget", x, tasks))
        return _read(lever, rank, theta_N, tasks)

    loose, tight = -18.0, 18.0  # strengths from 1.5e-8 to 6.6e7 of the lesson's curvature
    if at(tight).task_loss <= task_loss:
        return at(tight)
    if at(loose).task_loss > task_loss:
        return Point(lever, math.nan, math.nan, math.inf)
    return at(brentq(lambda x: at(x).task_loss - task_loss, loose, tight, xtol=1e-13))


def predicted_ordering(
    task_loss: float,
    levers: Iterable[str] = LEVERS,
    tasks: TwoTasks = EXAMPLE,
    tie: float = 1e-6,
) -> list[Place]:
    """The levers at equal task loss, the one that forgets least first; ties as they were given.

    Args:
        task_loss: see `point_at`.
        levers: some of `LEVERS`.
        tasks: the two losses.
        tie: levers share a place up to this difference, as a share of what naive training forgets.
    """
    given = list(levers)
    points = [point_at(lever, task_loss, tasks) for lever in given]
    slack = tie * tasks.pretraining_rise(fixed_point(tasks, Strengths()))
    ranked: list[Place] = []
    place, best = 1, math.inf
    for number, point in enumerate(sorted(points, key=lambda p: p.pretraining_rise), start=1):
        if number == 1 or point.pretraining_rise > best + slack:
            place, best = number, point.pretraining_rise
        ranked.append(Place(place, point))
    return sorted(ranked, key=lambda p: (p.place, given.index(p.point.lever)))


def _point(lever: str, strength: float, tasks: TwoTasks) -> Point:
    _check_lever(lever)
    if lever == "budget":
        theta_N = flow(tasks, Strengths(), strength)
    else:
        field = "rank" if lever == "low_rank" else lever
        settings: dict[str, Any] = {field: strength}
        theta_N = fixed_point(tasks, Strengths(**settings))
    return _read(lever, strength, theta_N, tasks)


def _read(lever: str, strength: float, theta_N: Array, tasks: TwoTasks) -> Point:
    return Point(lever, strength, tasks.task_loss(theta_N), tasks.pretraining_rise(theta_N))


def _turned(lever: str, x: float, tasks: TwoTasks) -> float:
    """The strength at `x` on a scale that all levers share: the larger, the less is learnt.

    At 0 the lever and the lesson pull about equally, on the average over directions.
    """
    lesson = float(np.trace(tasks.F_sft_NN)) / len(tasks.theta_0_N)
    if lever in ("replay", "rewind"):
        return float(expit(x if lever == "replay" else -x))
    if lever == "budget":
        return math.exp(-x) / lesson
    mean = {
        "kl_anchor": float(np.trace(tasks.F_NN)) / len(tasks.theta_0_N),
        "l2_sp": 1.0,
        "ewc": float(np.mean(tasks.fisher_N)),
    }[lever]
    return math.exp(x) * lesson / (mean or 1.0)


def _check_lever(lever: str) -> None:
    if lever not in LEVERS:
        raise RequestError(f"lever: '{lever}' is not one; {did_you_mean(lever, LEVERS)}")
