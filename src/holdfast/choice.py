"""Which checkpoint is kept: the best target among those that keep every guardrail.

    score = gain            where every guardrail is within its margin, in [-1, 1]
          = -worst fall     elsewhere, in margins: below -1

so that any checkpoint within the margins comes before any that is not, and among the latter the one
that fell least comes first. `transformers` keeps the checkpoint of the highest score
(`metric_for_best_model`). All of it is read on the selection split.

Source: Deb 2000 (CMAME 186:311), feasibility rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from holdfast.gate.margins import Gate, lower_is_better
from holdfast.gate.verdict import Row, decide
from holdfast.meters import Reading
from holdfast.points import Point, as_sealed, guardrails, judged

METRIC = "holdfast"
"""The name of the score, as `metric_for_best_model` has it."""
GAIN, FALL = "gain", "worst_fall"
"""Meters that every judged checkpoint is kept under; the second is named by the guardrail."""


@dataclass(frozen=True)
class Choice:
    """The rule, with the base's readings that checkpoints are held against."""

    before: Sequence[Reading]
    gate: Gate

    @classmethod
    def of(cls, before: Iterable[Reading], gate: Gate) -> Choice:
        """With the selection split of the base's readings, and the margins that fit one of them."""
        selection = [one for one in before if one.split == "selection"]
        rows = decide(as_sealed(selection), as_sealed(selection), gate).rows
        unused = {row.name for row in rows if row.meter == "margin"}
        margins = {name: text for name, text in gate.margins.items() if name not in unused}
        return cls(selection, gate.model_copy(update={"margins": margins}))

    def missing(self) -> str:
        """Why nothing can be chosen: no guardrail or no target; empty where it can."""
        result = decide(as_sealed(self.before), as_sealed(self.before), self.gate)
        if not guardrails(result):
            return "no guardrail is read on the selection split"
        if not _targets(result.rows):
            return "no target is read on the selection split: no held-out rows, no target probe"
        return ""

    def point(self, step: int, readings: Sequence[Reading]) -> Point:
        """What was read at a step, held against the base."""
        return judged(step, f"step {step}", self.before, readings, self.gate, "estimate")


def gain(point: Point) -> float:
    """Mean rise of the targets, in [-1, 1]; -1 where one is not a number.

    Of an accuracy the rise, of a loss the share of the base's by which it fell. The lesson's
    held-out loss is the target where no target probe is read.
    """
    rises = []
    for row in _targets(point.rows):
        rise = -row.difference / row.before if lower_is_better(row.unit) else row.difference
        rises.append(max(-1.0, rise) if math.isfinite(rise) else -1.0)
    return sum(rises) / len(rises) if rises else -1.0


def score(gain: float, worst: float) -> float:
    """The gain where nothing fell by more than its margin, else minus the worst fall."""
    return gain if worst <= 1 else -worst


def _targets(rows: Iterable[Row]) -> list[Row]:
    targets = [row for row in rows if row.kind == "target"]
    return [row for row in targets if row.meter == "probe"] or targets


def noted(point: Point, gain: float) -> list[Reading]:
    """A judged checkpoint as readings, so that the frontier can be drawn of them."""
    step = point.position
    return [
        Reading(GAIN, "target", "selection", step, gain, None, 1, "share"),
        Reading(FALL, point.culprit, "selection", step, point.worst, None, 1, "margins"),
    ]
