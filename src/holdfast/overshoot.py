"""Back along the straight way to the base, by as little as a budget asks for.

The final weights often overshoot (PEFT-Arena, arXiv 2605.28819). With u the worst upper bound in
budgets, the largest s is looked for at which

    W0 + s (W - W0)

has u <= MOST. Along the way a rise is nearly a power of s, to second order the square: the first
try is s = sqrt(AIM / u), the next ones follow from Brent's method on log u over log s, until u is
between NEAR and MOST. Two or three readings, where `holdfast rewind` maps the whole way. All are of
the selection split, the bounds one-sided at the gate's level.

A rise need not fall all along the way, and the noise of few texts falls less than the rise does. So
no s below FAR is tried for what is over by its bound alone: where the estimate is at most AIM at an
s of FAR or more, the one of these with the lowest bound stays, and the gate says what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.stats import norm

from holdfast.levers.forgetting import Rise, rises
from holdfast.meters import Reading
from holdfast.meters.drift import Start

MOST = 0.9
"""Part of each budget that may be used: the gate judges by other texts, which have noise of their
own. At 1, two of 21 runs on the lab ended over on the sealed split (docs/log.md)."""
AIM = 0.8
"""Part of the budget that is aimed at, so that one try usually does."""
NEAR = 0.7
"""At this part of the budget or more nothing is gained by going on."""
FAR = 0.8
"""Part of the way below which the lesson goes: 93 % of the facts learned were 2 % at 0.37 of the
way, to which a bound of 1.2 budgets on a rise of 0.9 had led (docs/log.md)."""
TRIES = 6
LEAST = 1e-3
"""Nearer to the base than this part of the way is the base."""


@dataclass(frozen=True)
class Settled:
    """What was left of the displacement, and of the budget."""

    scale: float
    """1: nothing was over; 0: only the base is within."""
    worst: float
    """Worst upper bound in budgets at that point; -inf where nothing was read."""
    culprit: str
    estimate: float
    """Worst rise in budgets as estimated, which may be another guardrail's."""

    @property
    def likely(self) -> bool:
        """Within by the estimate, and near enough for the lesson to be there."""
        return self.scale >= FAR and self.estimate <= AIM

    def __str__(self) -> str:
        if self.worst == -math.inf:
            return "nothing that has a budget was read while training; the gate alone judges it"
        where = f"{self.culprit} is at most at {self.worst:.2f}"
        if self.worst > MOST:
            where += f" (no rise is estimated at more than {self.estimate:.2f})"
        if self.scale == 1:
            likely = "likely " if self.worst > MOST else ""
            return f"{likely}within the budget: {where} of it"
        return f"drawn back to {self.scale:.1%} of the way, where {where} of its budget"


def settle(
    start: Start,
    read: Callable[[], Sequence[Reading]],
    before: Sequence[Reading],
    budget: Mapping[str, str],
    alpha: float,
) -> Settled:
    """Draw the weights back until every budget holds on the selection split, with some room.

    Where no try is within, or likely to be and near the end, the weights are the base's.

    Args:
        start: where the weights began; it moves them.
        read: reads the model as it is now.
        before: the base's readings.
        budget: as in `levers.forgetting`.
        alpha: level of each one-sided bound.
    """
    last = Settled(1.0, *_worst(rises(before, read(), budget), alpha))
    if last.worst <= MOST:
        return last
    seen, put = [last], start.way()

    def at(scale: float) -> Settled:
        put(scale)
        seen.append(Settled(scale, *_worst(rises(before, read(), budget), alpha)))
        return seen[-1]

    whole, nearest, far = math.log(last.worst / AIM), math.log(LEAST), math.log(FAR)
    if whole + 2 * far > 0 and last.estimate * FAR**2 <= AIM:
        at(FAR)

    def over(log_scale: float) -> float:
        if log_scale in (0.0, nearest):  # the square law stands for a reading next to the base
            return whole + 2 * log_scale
        if log_scale < far and any(one.likely for one in seen):
            return 0.0
        found = at(math.exp(log_scale))
        settled = NEAR <= found.worst <= MOST
        return 0.0 if settled else math.log(min(max(found.worst, LEAST), 1 / LEAST) / AIM)

    if over(nearest) < 0:
        brentq(over, nearest, 0.0, xtol=LEAST, maxiter=TRIES, disp=False)
    within = [one for one in seen if one.worst <= MOST]
    likely = [one for one in seen if one.likely]
    best = max(within, key=lambda one: one.scale, default=None)
    best = best or min(likely, key=lambda one: one.worst, default=None)
    if best is None:
        return at(0.0)
    put(best.scale)
    return best


def _worst(found: Sequence[Rise], alpha: float) -> tuple[float, str, float]:
    """The worst upper bound, whose it is, and the worst estimate."""
    z = float(norm.isf(alpha))
    uppers = [(one.value + z * one.stderr, one.name) for one in found]
    # a NaN compares with nothing
    broken = [(math.inf, name, math.inf) for upper, name in uppers if not math.isfinite(upper)]
    if broken or not uppers:
        return max(broken, default=(-math.inf, "nothing", -math.inf))
    return *max(uppers), max(one.value for one in found)
