"""The forgetting budget's arithmetic: measured rises in, strengths out. Plain floats, no state.

Rises and their errors are in budgets: 1 is all that may be forgotten at the end. At each check

    u = max_i (r_i + Z s_i)                  upper estimate of the worst rise
    a = 1 + EARLY (rate - last rate) / peak  what is allowed now (`allowed`)
    g = min(u / a - 1, 1)                    where u > a: it may end over
        max(u / SLACK - 1, -1)               where u < SLACK: even so it is well within
        0                                    in between: nothing moves
    x <- min(max(x + GAIN g, LOW), HIGH)

A walk of step size eta around where it is held stays at a distance that grows with eta, so a rise
comes down by itself as the schedule's rate does; what will come down is not to be held down.

x is the log of the multiplier, so this is the exponential method of multipliers,
lambda <- lambda exp(c g): the augmented Lagrangian whose multiplier cannot become negative and
whose steps ask for no scale. One multiplier serves all constraints, since one anchor does: that of
their maximum. What x stands for, in this order (`strengths`): the weight of what holds the base,
from 1/4 to 8 times the recipe's; then the lesson's share of the tokens, down to half; then the
step size, down to half. Where nothing holds the base (`held`), it is the step size alone.
And what the rate that is left cannot be trusted to repair is drawn back at once (`drawn_back`):
from 0.45 of the peak rate down, where u > b = 1 + 2 rate / peak, all weights are drawn towards
where they started, to sqrt(b / u) of the way, since to second order a rise is its square. In the
last tenth of the steps nothing is learned again, so what is over is left to the end, which reads
every text (`overshoot.py`).
Not more weight than that: Adam's steps are as long whatever the loss weighs, so what is nearly all
anchor walks on the noise of a few anchor rows. Nor a smaller step: what was forgotten early is
repaired by later steps, and small ones keep it.

r_i is taken as a random walk seen through noise, so that checks which each read a part of the texts
add up (`heard`): at each one its variance grows by (DRIFT max(1, |reading|))^2, then the
inverse-variance mean with what was read is taken.

Source: Bertsekas 1982, Constrained Optimization and Lagrange Multiplier Methods, section 5.1.2
(exponential penalty); Kalman 1960 (local level).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z = 1.0
"""Standard errors that an upper estimate lies above the estimate."""
SLACK = 0.5
"""Below this many budgets, by the upper estimate, the anchor is relaxed."""
EARLY = 5.0
"""Budgets more that are allowed at the peak of a learning rate which is to fall to 0: on the lab,
without a budget, the worst rise stood at 3 to 15 times its final value half of the way
(docs/budget.md)."""
GAIN = 0.35
"""To second order a rise falls as 1 / weight^2: 1/2 would cancel a small excess at once, but a rise
follows the weight only some steps later."""
DRIFT = 0.5
"""How far a rise wanders from one check to the next: in budgets, or in parts of itself."""
LATE, REPAIRED = 0.45, 2.0
"""The part of its peak from which down a rate is not left to repair all by itself, and the budgets
more, in the place of EARLY, that it is still left to repair (docs/log.md has the others tried)."""
ENDING = 0.1
"""Part of the steps that teaches nothing again: a check there, which has a part of the texts to go
by, drew back, and then the end did (docs/log.md)."""
BACK_LEAST = 0.5
"""No check draws the weights back by more."""
WEIGHT_LEAST, WEIGHT_MOST, SHARE_LEAST, RATE_LEAST = 0.25, 8.0, 0.5, 0.5
_WEIGHT, _SHARE, _RATE = math.log(WEIGHT_MOST), -math.log(SHARE_LEAST), -math.log(RATE_LEAST)


@dataclass(frozen=True)
class Strengths:
    """What the recipe's own settings are multiplied by."""

    weight: float = 1.0
    """Of every term of the loss but the lesson's."""
    share: float = 1.0
    """Of the tokens, the lesson's; the other streams take up the rest."""
    rate: float = 1.0
    """Of the learning rate."""

    def __mul__(self, other: Strengths) -> Strengths:
        return Strengths(
            self.weight * other.weight, self.share * other.share, self.rate * other.rate
        )


@dataclass(frozen=True)
class Level:
    """What is believed of one rise, in budgets."""

    mean: float
    variance: float

    def scaled(self, way: float) -> Level:
        """What is believed once the weights are drawn back to a part of their way."""
        return Level(self.mean * way**2, self.variance * way**4)

    @property
    def upper(self) -> float:
        """Z standard errors above the mean."""
        return self.mean + Z * math.sqrt(self.variance)

    @property
    def lower(self) -> float:
        """Z standard errors below the mean."""
        return self.mean - Z * math.sqrt(self.variance)


def heard(before: Level | None, rise: float, stderr: float) -> Level:
    """What is believed after a reading; `before` is None at the first one."""
    if before is None:
        return Level(rise, stderr**2)
    wandered = before.variance + (DRIFT * max(1.0, abs(rise))) ** 2
    trust = wandered / (wandered + stderr**2)
    return Level(before.mean + trust * (rise - before.mean), (1 - trust) * wandered)


def bounds(held: bool = True) -> tuple[float, float]:
    """LOW and HIGH."""
    return (math.log(WEIGHT_LEAST), _WEIGHT + _SHARE + _RATE) if held else (0.0, _RATE)


def allowed(to_fall: float) -> float:
    """Budgets that a rise may stand at, with so much of its peak rate for the schedule to fall."""
    return 1 + EARLY * to_fall


def moved(x: float, worst: float, allowed: float = 1.0, held: bool = True) -> float:
    """The multiplier's log after a check whose worst upper estimate was `worst` budgets."""
    over = min(max(worst / allowed - 1, 0.0), 1.0)
    under = min(max(1 - worst / SLACK, 0.0), 1.0)
    low, high = bounds(held)
    return min(max(x + GAIN * (over - under), low), high)


def drawn_back(worst: float, to_fall: float, to_come: float) -> float:
    """The part of the way from their start that the weights keep after a check; 1: all of it.

    Args:
        worst: upper estimate of the worst rise, in budgets.
        to_fall: what the learning rate has still to fall, as part of its peak.
        to_come: steps still to come, as part of the run's.
    """
    most = 1 + REPAIRED * to_fall
    if to_fall > LATE or to_come < ENDING or worst <= most:
        return 1.0
    return max(math.sqrt(most / worst), BACK_LEAST)


def strengths(x: float, held: bool = True) -> Strengths:
    """First the weight, then the lesson's share, last the step size."""
    if not held:
        return Strengths(rate=math.exp(-x))
    return Strengths(
        weight=math.exp(min(x, _WEIGHT)),
        share=math.exp(-min(max(x - _WEIGHT, 0.0), _SHARE)),
        rate=math.exp(-max(x - _WEIGHT - _SHARE, 0.0)),
    )


def worst_upper(levels: Iterable[Level]) -> float:
    """The worst upper estimate; -inf of nothing."""
    return max((level.upper for level in levels), default=-math.inf)
