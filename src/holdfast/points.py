"""Points on the way from base to tuned: how each is judged, and which is the furthest to keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from holdfast.gate.margins import lower_is_better
from holdfast.gate.stats import Verdict, paired_difference, superiority
from holdfast.gate.verdict import Gate, GateResult, Row, decide
from holdfast.meters import Reading

Rule = Literal["estimate", "shown"]
RULES: tuple[Rule, ...] = ("estimate", "shown")


@dataclass(frozen=True)
class Point:
    """One point of the way, as the selection split sees it."""

    position: int
    name: str
    rows: tuple[Row, ...]
    """Of guardrails and targets, against the base."""
    kept: bool
    """Whether every guardrail is within its margin."""
    worst: float
    """Largest fall of a guardrail, in margins: beyond 1 is beyond the margin; below 0 it rose."""
    culprit: str
    """The guardrail that fell so far: meter/name."""
    gains: dict[tuple[str, str], float] = field(default_factory=dict)
    """How much each target rose; of a loss, how much it fell."""
    readings: tuple[Reading, ...] = field(default=(), repr=False)

    def target_kept(self, tuned: Point) -> float | None:
        """Mean share, over the targets that the tuned model rose on, of what it rose."""
        rose = {name: gain for name, gain in tuned.gains.items() if gain > 0}
        shares = [self.gains[name] / gain for name, gain in rose.items()]
        mean = sum(shares) / len(shares) if shares else math.nan
        return mean if math.isfinite(mean) else None


def furthest(
    last: int, every: int, kept: Callable[[int], bool], recovered: Callable[[], bool]
) -> tuple[int, bool]:
    """The largest position in 0..last that is kept, and whether the way is monotone.

    The grid 0, every, 2 every, ..., last is asked first. If it is kept up to a point and never
    beyond, and `recovered()`, asked then, finds nothing, the gap is bisected. Otherwise the answer
    is the largest point of the grid below the first that is not kept. Position 0 is the base, and
    is kept.
    """
    grid = sorted({*range(0, last + 1, every), last})
    answers = [position == 0 or kept(position) for position in grid]
    straight = not recovered() and answers == sorted(answers, reverse=True)
    if all(answers):
        return last, straight
    first = answers.index(False)
    low, high = grid[first - 1], grid[first]
    while straight and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low, straight


def judged(
    position: int,
    name: str,
    before: Sequence[Reading],
    after: Sequence[Reading],
    gate: Gate,
    rule: Rule,
) -> Point:
    """Hold the readings of one point against the base's; of a NaN the fall is infinite."""
    result = decide(as_sealed(before), as_sealed(after), gate)
    guards = guardrails(result)
    falls = {(row.meter, row.name): fall_in_margins(row) for row in guards}
    if rule == "shown":
        kept = all(row.verdict is Verdict.PASS for row in guards)
    else:
        kept = all(fall <= 1 for fall in falls.values())
    # a canary domain and a probe may share a name
    culprit = max(falls, key=falls.__getitem__)
    rows = tuple(row for row in result.rows if row in guards or row.kind == "target")
    gains = {
        (row.meter, row.name): -row.difference if lower_is_better(row.unit) else row.difference
        for row in rows
        if row.kind == "target"
    }
    worst = falls[culprit]
    return Point(position, name, rows, kept, worst, "/".join(culprit), gains, tuple(after))


def as_sealed(readings: Iterable[Reading]) -> list[Reading]:
    """The gate's arithmetic takes sealed readings only; these are never kept as such."""
    return [replace(reading, split="sealed") for reading in readings]


def guardrails(result: GateResult) -> list[Row]:
    """The rows that must keep their margin."""
    return [row for row in result.rows if row.decisive and row.kind != "target"]


def fall_in_margins(row: Row) -> float:
    """The estimated fall over the margin; inf of what could not be compared."""
    if row.margin is None or not math.isfinite(row.difference):
        return math.inf
    fall = row.difference if lower_is_better(row.unit) else -row.difference
    if not row.margin:
        return math.copysign(math.inf, fall) if fall else 0.0
    return fall / row.margin + 0.0  # of -0.0 that is 0.0


def recovered(order: Sequence[Point], alpha: float) -> list[str]:
    """Guardrails that, having fallen, are shown to rise again further on.

    Each is compared between neighbours on the same items, at alpha over the number of comparisons.
    """
    guards = {(row.meter, row.name) for row in order[-1].rows if row.kind != "target"}
    level = alpha / max(1, len(guards) * (len(order) - 1))
    found = set()
    for one, other in itertools.pairwise(order):
        fell = {(row.meter, row.name) for row in one.rows if fall_in_margins(row) > 0}
        then = {(r.meter, r.name): r for r in one.readings}
        for now in other.readings:
            key = (now.meter, now.name)
            if key in guards & fell and _rose(then[key], now, level):
                found.add("/".join(key))
    return sorted(found)


def _rose(then: Reading, now: Reading, alpha: float) -> bool:
    sign = -1.0 if lower_is_better(now.unit) else 1.0
    change = paired_difference(
        [sign * then.items[i] for i in now.items],
        [sign * value for value in now.items.values()],
        clusters=[now.clusters.get(i, i) for i in now.items],
        alpha=alpha,
        bounded=now.unit == "accuracy",
    )
    return superiority(change) is Verdict.PASS
