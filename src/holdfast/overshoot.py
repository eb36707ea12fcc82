"""Back along the straight way to the base, by as little as a budget asks for.

The final weights often overshoot (PEFT-Arena, arXiv 2605.28819). To second order a rise grows with
the square of the way, so with u the worst upper bound in budgets the weights are drawn to

    W0 + s (W - W0),   s = sqrt(AIM / u),

read again, and drawn further until u is at most 1. Where that went further back than was needed,
the power by which u fell is read off and the way is gone forward once, to where it says AIM is; if
that is over, back again. Two or three readings, where `holdfast rewind` maps the whole way. All are
of the selection split, the bounds one-sided at the gate's level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import norm

from holdfast.levers.forgetting import Rise, rises
from holdfast.meters import Reading
from holdfast.meters.drift import Start

AIM = 0.9
"""Part of the budget that is aimed at, so that one try usually does."""
NEAR = 0.75
"""At this part of the budget or more nothing is gained by going forward."""
TRIES = 8
"""After so many the weights are left where they are, and the gate says what is over."""


@dataclass(frozen=True)
class Settled:
    """What was left of the displacement, and of the budget."""

    scale: float
    """1: nothing was over; 0: only the base is within."""
    worst: float
    """Worst upper bound in budgets at that point; -inf where nothing was read."""
    culprit: str

    def __str__(self) -> str:
        if self.scale == 1:
            return f"within the budget: {self.culprit} is at most at {self.worst:.2f} of it"
        return (
            f"drawn back to {self.scale:.1%} of the way, where {self.culprit} is at most at "
            f"{self.worst:.2f} of its budget"
        )


def settle(
    start: Start,
    read: Callable[[], Sequence[Reading]],
    before: Sequence[Reading],
    budget: Mapping[str, str],
    alpha: float,
) -> Settled:
    """Draw the weights back until every budget holds on the selection split.

    Args:
        start: where the weights began; it moves them.
        read: reads the model as it is now.
        before: the base's readings.
        budget: as in `levers.forgetting`.
        alpha: level of each one-sided bound.
    """
    scale, seen = 1.0, list[tuple[float, float, str]]()
    for _ in range(TRIES):
        seen.append((scale, *_worst(rises(before, read(), budget), alpha)))
        worst = seen[-1][1]
        if worst <= 1:
            break
        shrink = math.sqrt(AIM / worst) if math.isfinite(worst) else 0.0
        start.scale(shrink)
        scale *= shrink
    kept = Settled(*seen[-1])
    forward = _forward(seen)
    if forward == 1:
        return kept
    start.scale(forward)
    further = Settled(scale * forward, *_worst(rises(before, read(), budget), alpha))
    if further.worst <= 1:
        return further
    start.scale(1 / forward)
    return kept


def _forward(seen: Sequence[tuple[float, float, str]]) -> float:
    """By which factor to go forward from the last point; 1: stay.

    On u ~ s^p through the last two points, p from 1 to 8.
    """
    if len(seen) < 2:
        return 1.0
    (near, over, _), (far, within, _) = seen[-2:]
    if not 0 < within < NEAR or not math.isfinite(over):
        return 1.0
    power = min(max(math.log(over / within) / math.log(near / far), 1.0), 8.0)
    return float(min((AIM / within) ** (1 / power), near / far))


def _worst(found: Sequence[Rise], alpha: float) -> tuple[float, str]:
    z = float(norm.isf(alpha))
    uppers = [(one.value + z * one.stderr, one.name) for one in found]
    # a NaN compares with nothing
    broken = [(math.inf, name) for upper, name in uppers if not math.isfinite(upper)]
    return max(broken or uppers, default=(-math.inf, "nothing"))
