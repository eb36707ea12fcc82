"""The gate's decision: every guardrail must pass, at level alpha each, or nothing does.

Release needs *all* capabilities to be non-inferior: an intersection-union test (Berger 1982,
Technometrics 24:295-300). Its level is alpha without any correction for the number of
capabilities, because to pass wrongly, the one that truly fell must pass its own level-alpha test.

The gate fails closed. A reading that is missing, holds other items, is not finite or is empty is
a FAIL, with its reason, never a row left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from holdfast.gate.margins import UNIT_OF, Gate, Margin, candidate_keys, lower_is_better
from holdfast.gate.render import explain, markdown_table, rich_table
from holdfast.gate.stats import (
    PairedDifference,
    Verdict,
    items_needed,
    non_inferiority,
    paired_difference,
    stderr_of_mean,
    superiority,
)
from holdfast.meters import Reading

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Gate", "GateResult", "Margin", "Row", "Verdict", "decide", "halted"]

_JUDGED_METERS = {"canary", "probe", "adoption"}
_KINDS = ("adoption", "target", "canary", "control", "rare", "guardrail")
_JUDGED_TAGS = frozenset(_KINDS)
_EXIT_CODE = {Verdict.PASS: 0, Verdict.FAIL: 3, Verdict.INCONCLUSIVE: 4}


@dataclass(frozen=True)
class Row:
    """One capability before and after, in the reading's own unit."""

    name: str
    meter: str
    kind: str
    """guardrail, canary, rare, control, target or adoption."""
    decisive: bool
    """Whether the verdict counts; the other rows are for information."""
    verdict: Verdict
    reason: str
    unit: str = ""
    n: int = 0
    clusters: int = 0
    before: float = math.nan
    before_stderr: float = math.nan
    after: float = math.nan
    after_stderr: float = math.nan
    difference: float = math.nan
    """after - before; for a loss, a rise is the bad direction."""
    lower: float = math.nan
    """One-sided bound of `difference` at level alpha."""
    upper: float = math.nan
    margin: float | None = None
    """Largest accepted fall (of a loss: rise), as a positive number of the unit; None: a target."""
    margin_text: str = ""
    """The margin as the recipe writes it: 2pt, 1%."""
    items_needed: int | None = None
    """Items that would decide, if it is undecided and they can be told."""
    method: str = ""


@dataclass(frozen=True)
class GateResult:
    """The verdict and the rows it rests on."""

    verdict: Verdict
    reason: str
    """One sentence, the verdict first."""
    alpha: float
    rows: tuple[Row, ...]

    @property
    def exit_code(self) -> int:
        """0 PASS, 3 FAIL, 4 INCONCLUSIVE."""
        return _EXIT_CODE[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """The content of `verdict.json`: plain values, null where a number is not finite."""
        return {
            "verdict": str(self.verdict),
            "reason": self.reason,
            "exit_code": self.exit_code,
            "alpha": self.alpha,
            "rows": [{k: _plain(v) for k, v in asdict(row).items()} for row in self.rows],
        }

    def table(self) -> Table:
        """The rows as a table for the terminal."""
        return rich_table(self)

    def markdown(self) -> str:
        """The rows as a Markdown table, for the model card."""
        return markdown_table(self)


def decide(before: Sequence[Reading], after: Sequence[Reading], gate: Gate) -> GateResult:
    """Compare the sealed readings of base and tuned model, and say whether it may be released.

    Args:
        before: readings of the base. Only those of the sealed split count.
        after: readings of the tuned model on the same items.
        gate: margins, level, and which kinds count.

    Judged are canaries, probes, the adoption meter, and whatever carries a kind as a tag; drift,
    KL and training losses are not. A probe without a tag is a guardrail.
    """
    first, last = _by_key(before), _by_key(after)
    keys = list(dict.fromkeys([*first, *last]))
    rows = [_row(first.get(key, []), last.get(key, []), gate) for key in keys]
    rows += _unused_margins([group[0] for group in (last | first).values()], gate)
    verdict = _combine(row for row in rows if row.decisive)
    return GateResult(verdict, _sentence(verdict, rows), gate.alpha, tuple(rows))


def is_judged(meter: str, tags: Iterable[str]) -> bool:
    """Whether readings of a meter, with such tags, are part of a verdict."""
    return meter in _JUDGED_METERS or not _JUDGED_TAGS.isdisjoint(tags)


def halted(result: GateResult, why: Mapping[str, str]) -> GateResult:
    """The same, failed by the alarms that ended the run: name -> text."""
    return _failed_by(
        result, [Row(name, "alarm", "guardrail", True, Verdict.FAIL, why[name]) for name in why]
    )


def standing(result: GateResult, recorded: Iterable[Mapping[str, Any]], gate: Gate) -> GateResult:
    """The same, failed by what a run failed by and no item of it shows.

    That is the alarms that ended it, and what was not read or not alike before and after.

    Args:
        recorded: the rows of the run's `verdict.json`.
    """
    rows = [
        Row(str(row["name"]), str(row["meter"]), kind, True, Verdict.FAIL, str(row["reason"]))
        for row in recorded
        if row["verdict"] == Verdict.FAIL and not row["n"] and row["meter"] != "margin"
        if _is_decisive(kind := str(row["kind"]), gate)
    ]
    return _failed_by(result, rows) if rows else result


def _failed_by(result: GateResult, rows: Sequence[Row]) -> GateResult:
    """With rows that fail in place of any of the same name."""
    named = {(row.meter, row.name) for row in rows}
    every = (*rows, *(row for row in result.rows if (row.meter, row.name) not in named))
    return replace(result, verdict=Verdict.FAIL, reason=_sentence(Verdict.FAIL, every), rows=every)


def _by_key(readings: Iterable[Reading]) -> dict[tuple[str, str], list[Reading]]:
    """The judged readings of the sealed split by (meter, name)."""
    found: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        if reading.split == "sealed" and is_judged(reading.meter, reading.tags):
            found.setdefault((reading.meter, reading.name), []).append(reading)
    return found


def _kind(reading: Reading) -> str:
    """The tag or meter that says what the reading is for; guardrail without one."""
    return next((k for k in _KINDS if k in (*reading.tags, reading.meter)), "guardrail")


def _is_decisive(kind: str, gate: Gate) -> bool:
    return {"target": gate.target, "adoption": gate.adoption}.get(kind) != "report"


def _row(before: list[Reading], after: list[Reading], gate: Gate) -> Row:
    """Judge one (meter, name)."""
    reading = (before or after)[0]
    kind = _kind(reading)
    row = Row(
        name=reading.name,
        meter=reading.meter,
        kind=kind,
        decisive=_is_decisive(kind, gate),
        verdict=Verdict.FAIL,
        reason=_mismatch(before, after),
        unit=reading.unit,
    )
    return row if row.reason else _compare(row, before[0], after[0], gate)


def _mismatch(before: list[Reading], after: list[Reading]) -> str:
    """Why two readings cannot be compared; empty where they can."""
    for which, readings in (("before", before), ("after", after)):
        if not readings:
            return f"not read {which} training"
        if len(readings) > 1:
            return f"read {len(readings)} times {which} training; one reading is expected"
        if not readings[0].items:
            return f"no items {which} training"
    x, y = before[0], after[0]
    if x.unit != y.unit:
        return f"read in {x.unit!r} before and in {y.unit!r} after"
    if x.unit not in UNIT_OF:
        return f"unit {x.unit!r} cannot be judged; allowed: {', '.join(sorted(UNIT_OF))}"
    if _kind(x) != _kind(y):
        return f"{_kind(x)} before, {_kind(y)} after"
    if odd := sorted(x.items.keys() ^ y.items.keys()):
        return f"other items before than after: {len(odd)} are in one only, e.g. {odd[0]!r}"
    if x.clusters != y.clusters:
        return "items are clustered otherwise before than after"
    if bad := [i for r in (x, y) for i, value in r.items.items() if not math.isfinite(value)]:
        return f"{len(bad)} values are not finite, e.g. of item {bad[0]!r}"
    values = (*x.items.values(), *y.items.values())
    if x.unit == "accuracy" and not all(0 <= value <= 1 for value in values):
        return "accuracies outside 0..1"
    return ""


def _compare(row: Row, x: Reading, y: Reading, gate: Gate) -> Row:
    """The row of two comparable readings."""
    ids = list(x.items)
    before, after = [x.items[i] for i in ids], [y.items[i] for i in ids]
    clusters = [x.clusters.get(i, i) for i in ids] if x.clusters else None
    sign = -1.0 if lower_is_better(row.unit) else 1.0
    gain = paired_difference(
        [sign * value for value in before],
        [sign * value for value in after],
        clusters=clusters,
        alpha=gate.alpha,
        bounded=row.unit == "accuracy",
    )
    base = math.fsum(before) / len(before)
    compared = replace(
        row,
        n=gain.n,
        clusters=gain.clusters,
        before=base,
        before_stderr=stderr_of_mean(before, clusters),
        after=math.fsum(after) / len(after),
        after_stderr=stderr_of_mean(after, clusters),
        difference=sign * gain.estimate,
        lower=min(sign * gain.lower, sign * gain.upper),
        upper=max(sign * gain.lower, sign * gain.upper),
        method=gain.method,
        **_judge(row, gain, base, x, gate),
    )
    return replace(compared, reason=explain(compared))


def _judge(
    row: Row, gain: PairedDifference, base: float, reading: Reading, gate: Gate
) -> dict[str, Any]:
    """Verdict, margin and items needed; a target has a margin of none and must rise."""
    if row.kind == "target":
        verdict, margin, text = superiority(gain), None, ""
    else:
        found = gate.margin_for(row.meter, row.name, row.unit, reading.tags)
        assert found is not None, "every unit of UNIT_OF has a default margin"
        margin, text = found[0].absolute(base), str(found[0])
        verdict = non_inferiority(gain, margin)
    undecided = verdict is Verdict.INCONCLUSIVE
    return {
        "verdict": verdict,
        "margin": margin,
        "margin_text": text,
        "items_needed": items_needed(gain, margin or 0.0) if undecided else None,
    }


def _unused_margins(readings: Sequence[Reading], gate: Gate) -> list[Row]:
    """A FAIL for each margin of the recipe that guards nothing: a promise nobody measured."""
    rows = []
    for key, text in gate.margins.items():
        named = [r for r in readings if key in candidate_keys(r.meter, r.name, r.unit, r.tags)]
        unit = Margin.parse(text).unit
        if any(UNIT_OF.get(reading.unit) == unit for reading in named):
            continue
        reason = f"the recipe sets a margin of {text}, but nothing of that name was read"
        if named:
            fits = UNIT_OF.get(named[0].unit, "pt")
            reason = (
                f"the recipe sets a margin of {text}, but it is read in {named[0].unit}: "
                f"write it in {fits}, e.g. {key}: {text.removesuffix(unit)}{fits}"
            )
        rows.append(Row(key, "margin", "guardrail", True, Verdict.FAIL, reason, margin_text=text))
    return rows


def _combine(rows: Iterable[Row]) -> Verdict:
    """Intersection-union: one FAIL fails; PASS needs a guardrail, and every row to pass."""
    rows = list(rows)
    verdicts = {row.verdict for row in rows}
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    guarded = any(row.kind != "target" for row in rows)
    return Verdict.PASS if guarded and verdicts == {Verdict.PASS} else Verdict.INCONCLUSIVE


def _sentence(verdict: Verdict, rows: Sequence[Row]) -> str:
    """The verdict in one sentence."""
    decisive = [row for row in rows if row.decisive]
    guards = [row for row in decisive if row.kind != "target"]
    targets = [row for row in decisive if row.kind == "target"]
    culprits = [row for row in decisive if row.verdict is verdict]
    if verdict is Verdict.PASS:
        rose = f", and {_named(targets)} rose" if targets else ""
        what = "guardrail" if len(guards) == 1 else "guardrails"
        return f"PASS: {len(guards)} of {len(guards)} {what} kept within margin{rose}."
    if not guards and verdict is Verdict.INCONCLUSIVE:
        return "INCONCLUSIVE: no guardrail was read on the sealed split, so nothing is known."
    if verdict is Verdict.FAIL:
        told = [f"{row.name}: {row.reason}" for row in culprits[:3]]
        more = [f"and {len(culprits) - 3} more"] if len(culprits) > 3 else []
        return f"FAIL: {'; '.join(told + more)}."
    return f"INCONCLUSIVE: too little data to tell for {_named(culprits)}."


def _named(rows: Sequence[Row]) -> str:
    return ", ".join(row.name for row in rows)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Verdict) else value
