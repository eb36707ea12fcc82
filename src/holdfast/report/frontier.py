"""The frontier: what is kept of the target against what the guardrails lose.

Its points are those of a rewind, the checkpoints of a run, or a base and a tuned model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from holdfast.choice import FALL, GAIN
from holdfast.gate.margins import lower_is_better
from holdfast.points import fall_in_margins, guardrails
from holdfast.report.draw import (
    LEGEND,
    MUTED,
    PALETTE,
    VERDICT_COLOUR,
    Figure,
    Trace,
    finite,
    line_at,
    make_figure,
    note_at,
)

if TYPE_CHECKING:
    from holdfast.gate.verdict import GateResult

HEADINGS = ("point", "way", "target kept", "worst guardrail", "fall, in margins", "")
KINDS = (
    ("within margin", VERDICT_COLOUR["PASS"], "circle"),
    ("beyond margin", VERDICT_COLOUR["FAIL"], "x"),
    ("chosen", PALETTE[0], "star"),
)
"""Name, colour and symbol of a point."""


@dataclass(frozen=True)
class Mark:
    """One point between base and tuned."""

    name: str
    way: float
    """How far it is from the base: 0..1."""
    target: float | None
    """Share of what the target gained in all; None where no target was read, or none rose."""
    worst: float
    """Largest fall of a guardrail, in margins."""
    culprit: str
    kept: bool
    chosen: bool

    @property
    def kind(self) -> str:
        """A name of `KINDS`."""
        return "chosen" if self.chosen else "within margin" if self.kept else "beyond margin"

    def as_record(self) -> dict[str, Any]:
        """Plain values, null where the fall is not finite."""
        return asdict(self) | {"worst": finite(self.worst)}

    def cells(self) -> tuple[str, ...]:
        """The point under `HEADINGS`."""
        return (
            self.name,
            f"{self.way:.1%}",
            "—" if self.target is None else f"{self.target:.1%}",
            self.culprit,
            f"{self.worst:+.2f}",
            self.kind,
        )


def of_checkpoints(records: Iterable[Mapping[str, Any]], kept: int | None) -> list[Mark]:
    """The frontier of a run: base, the checkpoints that were judged, the one that is kept.

    Args:
        records: lines of `readings.jsonl`.
        kept: the step whose weights are the artifact.
    """
    gains: dict[int, float] = {}
    falls: dict[int, tuple[float, str]] = {}
    for one in records:
        if one["meter"] == GAIN:
            gains[one["step"]] = one["value"]
        elif one["meter"] == FALL:
            falls[one["step"]] = (one["value"], one["name"])
    steps = sorted(gains.keys() & falls.keys())
    if not steps:
        return []
    last = steps[-1]
    found = [Mark("base", 0.0, 0.0 if gains[last] > 0 else None, 0.0, "", True, kept == 0)]
    for step in steps:
        worst, culprit = falls[step]
        found.append(
            Mark(
                name=f"step {step}",
                way=step / last,
                target=gains[step] / gains[last] if gains[last] > 0 else None,
                worst=worst,
                culprit=culprit,
                kept=worst <= 1,
                chosen=step == kept,
            )
        )
    return found


def of_two(result: GateResult) -> list[Mark]:
    """Base and tuned model, as a gate has compared them; none where no guardrail was read."""
    falls = {f"{row.meter}/{row.name}": fall_in_margins(row) for row in guardrails(result)}
    if not falls:
        return []
    targets = [row for row in result.rows if row.kind == "target"]
    rose = any(row.difference and (row.difference < 0) == lower_is_better(row.unit)
               for row in targets)  # fmt: skip
    culprit = max(falls, key=falls.__getitem__)
    worst = falls[culprit]
    return [
        Mark("base", 0.0, 0.0 if rose else None, 0.0, "", kept=True, chosen=False),
        Mark("tuned", 1.0, 1.0 if rose else None, worst, culprit, kept=worst <= 1, chosen=False),
    ]


def told(marks: Sequence[Mark]) -> str:
    """Which checkpoint is kept, and why, in one sentence."""
    read = marks[1:]
    chosen = next(mark for mark in read if mark.chosen)
    within = [mark for mark in read if mark.kept]
    worst = f"{chosen.culprit} at {chosen.worst:+.2f} of its margin"
    if chosen.kept:
        return (
            f"{chosen.name} of {read[-1].name.removeprefix('step ')}: the best target of the "
            f"{len(within)} of {len(read)} checkpoints within every margin (worst: {worst})"
        )
    return (
        f"{chosen.name} of {read[-1].name.removeprefix('step ')}: none of {len(read)} checkpoints "
        f"is within every margin, and this one fell least ({worst})"
    )


def frontier(marks: Sequence[Mark], beside: Sequence[Mark] = ()) -> Figure | None:
    """Target kept against the worst guardrail; without a target, the way gone stands for it.

    Args:
        marks: from the base on.
        beside: another way, such as a run's checkpoints beside the points of its rewind.
    """
    if not marks:
        return None
    by_target = all(mark.target is not None for mark in (*marks, *beside))

    def place(mark: Mark) -> float:
        return 100 * (mark.target if by_target and mark.target is not None else mark.way)

    xs = [place(mark) for mark in marks]
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "way",
            "x": xs,
            "y": [finite(mark.worst) for mark in marks],
            "line": {"width": 1, "color": MUTED},
            "showlegend": False,
            "hoverinfo": "skip",
        }
    ]
    for name, colour, symbol in KINDS:
        mine = [(x, mark) for x, mark in zip(xs, marks, strict=True) if mark.kind == name]
        if mine:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers+text",
                    "name": name,
                    "x": [x for x, _ in mine],
                    "y": [finite(mark.worst) for _, mark in mine],
                    "text": [escape(mark.name) for _, mark in mine],
                    "textposition": "top center",
                    "hovertext": [escape(mark.culprit) for _, mark in mine],
                    "marker": {
                        "size": 14 if name == "chosen" else 9,
                        "color": colour,
                        "symbol": symbol,
                    },
                }
            )
    if beside:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "checkpoints of the run",
                "x": [place(mark) for mark in beside],
                "y": [finite(mark.worst) for mark in beside],
                "hovertext": [escape(f"{mark.name}: {mark.culprit}") for mark in beside],
                "line": {"width": 1, "color": MUTED, "dash": "dot"},
                "marker": {"size": 7, "color": MUTED, "symbol": "diamond"},
            }
        )
    layout = {
        "xaxis": {"title": {"text": f"{'target' if by_target else 'way'}, %"}},
        "yaxis": {"title": {"text": "worst fall, in margins"}},
        "shapes": [line_at("y", 1)],
        "annotations": [note_at("y", 1, "margin")],
        "height": 420,
        "legend": LEGEND,
    }
    what = (
        "what is kept of the target's gain"
        if by_target
        else "how far the point is from the base (no target rose)"
    )
    caption = f"Points on the way from the base: {what}, against the largest fall of a guardrail."
    return make_figure("frontier", "Frontier", caption, traces, layout, wide=True)
