"""Forgetting: a budget for it, which the strength of what holds the base follows.

Source: exponential method of multipliers (Bertsekas 1982, section 5.1.2); equation in `dual.py`.
Acts on: the weight of every term but the lesson's, then the lesson's share of the tokens, last the
step size, each within bounds; loosened again where rises leave room, the weight also below the
recipe's. Late in the run, on the weights: what is over is drawn back towards their start.
Estimator: paired rises of the same texts and items on the selection split, with their standard
error; nothing of the sealed split is looked at.
Cost: readings while training, `CHECKS` of them, each of at most `DOCUMENTS` texts a domain.
While the learning rate has still to fall, more is allowed: large steps do damage that later,
smaller ones repair, and a budget is for the model that comes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from holdfast.dual import (
    Level,
    Strengths,
    allowed,
    bounds,
    drawn_back,
    heard,
    moved,
    strengths,
    worst_upper,
)
from holdfast.gate.margins import Gate, Margin, MarginText, in_short, lower_is_better
from holdfast.gate.stats import paired_difference
from holdfast.levers import Lever, Memory, ProbeContext

if TYPE_CHECKING:
    from holdfast.meters import Reading

CHECKS = 8
"""Readings while training, where `train.measure_every` says nothing else."""
DOCUMENTS = 24
"""Texts of a domain that a reading takes; another part of them each time."""
PATIENCE = 3
"""Checks in a row with nothing left to tighten, or hopeless, after which a budget cannot be met."""
HOPELESS = 10.0
"""Budgets, by the lower estimate, that no strength within its bounds brings back."""


BROKEN = 1e9
"""Budgets that a loss counts as which is no number."""
FALLING = 0.9
"""A rise that came down to this part of what it was is being repaired."""


@dataclass(frozen=True)
class Rise:
    """How much one guardrail fell, in budgets."""

    name: str
    key: str
    """Of the budget that it counts against."""
    value: float
    stderr: float


class Forgetting(Lever):
    """How much may be forgotten, in place of an anchor's weight."""

    OFF: ClassVar = {"budget": {}}

    budget: dict[str, MarginText] = Field(default_factory=dict)
    """What may be lost, as in `gate.margins`, whose margins it becomes unless they are given:
    `{canary: 1%, gsm8k: 2pt}`; `1%` alone stands for `{canary: 1%}`. Empty turns it off."""

    @field_validator("budget", mode="before")
    @classmethod
    def _in_short(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            value = str(Margin.parse(value))  # says which units there are
        return in_short(value) if isinstance(value, str) else value

    def strengths(self, memory: Memory) -> Strengths:
        """What the multiplier stands for now."""
        return strengths(memory.get("x", 0.0), memory.get("held", True))

    def after_probe(self, readings: Sequence[Reading], ctx: ProbeContext, memory: Memory) -> None:
        """Move the multiplier by the worst rise; stop where nothing is left to move."""
        found = rises(ctx.before, readings, self.budget)
        if not found:
            return
        levels = {name: Level(*pair) for name, pair in memory.get("levels", {}).items()}
        for rise in found:
            if math.isfinite(rise.value):
                levels[rise.name] = heard(levels.get(rise.name), rise.value, rise.stderr)
        broken = [rise.name for rise in found if not math.isfinite(rise.value)]
        worst = BROKEN if broken else worst_upper(levels.values())
        culprit = broken[0] if broken else max(levels, key=lambda name: levels[name].upper)
        most = allowed(ctx.to_fall)
        x, held = memory.get("x", 0.0), memory.get("held", False) or ctx.held
        memory["x"], memory["held"] = moved(x, worst, most, held), held
        kept = drawn_back(worst, ctx.to_fall, ctx.to_come)
        ctx.drawn_back *= kept
        memory["levels"] = {name: list(astuple(one.scaled(kept))) for name, one in levels.items()}
        self._tell(ctx, memory, x, worst, most, culprit, kept)
        lesson = [r.value for r in readings if (r.meter, r.split) == ("lesson", "selection")]
        memory.setdefault("frontier", []).append(
            [ctx.step, sum(lesson) / len(lesson) if lesson else None, worst, culprit]
        )
        least = BROKEN if broken else max(level.lower for level in levels.values())
        falling = worst < FALLING * memory.get("worst", math.inf)
        lost = least > HOPELESS or (least > most and x == bounds(held)[1])
        memory["stuck"] = memory.get("stuck", 0) + 1 if lost and not falling else 0
        memory["worst"] = worst
        if memory["stuck"] >= PATIENCE:
            ctx.stop = (
                f"levers.forgetting.budget: cannot be met: {culprit} is at {worst:.2f} budgets, "
                "and no strength within its bounds brings it back; allow more, or take out rows "
                f"that contradict what must stay. Reached: {'; '.join(reached(memory))}"
            )

    def _tell(
        self,
        ctx: ProbeContext,
        memory: Memory,
        before: float,
        worst: float,
        most: float,
        culprit: str,
        kept: float,
    ) -> None:
        """Keep what was seen and what it moved, as readings and, where something moved, a note."""
        now = self.strengths(memory)
        ctx.note("worst_rise", culprit, worst)
        for name in ("weight", "share", "rate"):
            ctx.note("strength", name, getattr(now, name))
        if memory["x"] != before:
            word = "tightened" if memory["x"] > before else "loosened"
            memory.setdefault("moves", []).append(
                f"step {ctx.step}: {culprit} at {worst:.2f} budgets, {most:.1f} are allowed now, "
                f"so {word}: weight x{now.weight:.3g}, lesson's share x{now.share:.3g}, "
                f"step x{now.rate:.3g}"
            )
        if kept != 1:
            ctx.note("strength", "drawn_back", kept)
            memory.setdefault("moves", []).append(
                f"step {ctx.step}: {culprit} at {worst:.2f} budgets, drawn back to {kept:.1%} of "
                "the way"
            )


def warnings(before: Sequence[Reading], budget: Mapping[str, str]) -> list[str]:
    """What of a budget is not watched while training, or by too little; a line each."""
    gate = Gate(margins=dict(budget))
    watched = {
        reading.name: (margin[1], len(reading.items))
        for reading in before
        if reading.split == "selection" and "target" not in reading.tags
        if (margin := gate.margin_for(reading.meter, reading.name, reading.unit, reading.tags))
        if margin[1] in budget
    }
    found = []
    if unread := sorted(budget.keys() - {key for key, _ in watched.values()}):
        found.append(
            f"levers.forgetting.budget: {', '.join(unread)}: not read while training, so left to "
            "the gate; train.measure_probes: true reads the probes' selection half"
        )
    if few := [f"{name} ({n})" for name, (_, n) in sorted(watched.items()) if n < DOCUMENTS]:
        found.append(
            f"levers.forgetting.budget: few texts or items to watch: {', '.join(few)}; by so few a "
            "bound is wide, and more is drawn back than need be: give each "
            f"{2 * DOCUMENTS} or more, half of which are for the gate"
        )
    return found


def reached(memory: Memory) -> list[str]:
    """The frontier so far: what was learned against what was forgotten, a line each check."""
    return [
        f"step {step}: {'' if lesson is None else f'lesson {lesson:.3f} nats, '}"
        f"{culprit} at {worst:.2f} budgets"
        for step, lesson, worst, culprit in memory.get("frontier", [])
    ]


def rises(
    before: Sequence[Reading], now: Sequence[Reading], budget: Mapping[str, str]
) -> list[Rise]:
    """Each guardrail of the selection split that a budget names: its rise and error, in budgets.

    Paired, on the items that were read both times. Targets are not guardrails.
    """
    gate = Gate(margins=dict(budget))
    then = {(r.meter, r.name): r for r in before if r.split == "selection"}
    found = []
    for reading in now:
        base = then.get((reading.meter, reading.name))
        if reading.split != "selection" or base is None or "target" in reading.tags:
            continue
        margin = gate.margin_for(reading.meter, reading.name, reading.unit, reading.tags)
        ids = [item for item in reading.items if item in base.items]
        if margin is None or margin[1] not in budget or not ids:
            continue
        sign = -1.0 if lower_is_better(reading.unit) else 1.0
        first = [base.items[item] for item in ids]
        change = paired_difference(
            [sign * value for value in first],
            [sign * reading.items[item] for item in ids],
            clusters=[reading.clusters.get(item, item) for item in ids],
            bounded=reading.unit == "accuracy",
        )
        absolute = Margin.parse(budget[margin[1]]).absolute(math.fsum(first) / len(first))
        name = f"{reading.meter}/{reading.name}"
        stderr = change.stderr if math.isfinite(change.stderr) else absolute
        found.append(Rise(name, margin[1], -change.estimate / absolute, stderr / absolute))
    return found
