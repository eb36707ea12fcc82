"""Every meter that was read more than once, over the steps, with its 95 % intervals."""

from __future__ import annotations

from html import escape
from typing import Any

from holdfast.choice import FALL, GAIN
from holdfast.report.data import ReportData
from holdfast.report.draw import (
    PALETTE,
    Figure,
    Point,
    Trace,
    curve,
    faint,
    finite,
    line_at,
    make_figure,
    note_at,
    of_meter,
    series_of,
    two_panels,
)

Z = 1.96
"""Standard errors to either end of a 95 % interval."""
MOST = len(PALETTE)
"""Curves of one figure; of more, those that moved furthest are drawn."""
ELSEWHERE = ("loss", "grad_norm", "learning_rate", "refused_steps", "alarm", GAIN, FALL)
"""Meters of training itself, which have figures of their own or none; alarms are lines in them."""
BY_PART = (
    "drift",
    "drift_block",
    "effective_rank",
    "stable_rank",
    "gradient_near_zero",
    "expert_drift",
    "expert_load",
    "experts_in_use",
)
"""Meters whose names are parts of the model."""
INTERVALS = "Bars are 95 % intervals of each reading by itself."


def trajectories(data: ReportData) -> list[Figure]:
    """Canaries, probes, then every other meter in the order of its first reading."""
    meters = dict.fromkeys(str(reading.get("meter", "")) for reading in data.readings)
    others = [meter for meter in meters if meter not in ("canary", "probe", *ELSEWHERE)]
    drawn = [canaries(data), probes(data)]
    for meter in others:
        units = dict.fromkeys(str(r.get("unit") or "") for r in of_meter(data, meter))
        drawn += [other(data, meter, unit) for unit in units]
    return [figure for figure in drawn if figure is not None]


def canaries(data: ReportData) -> Figure | None:
    """Canary loss by domain, in percent of its first reading; the margin where all share one."""
    units = {str(r.get("unit")) for r in of_meter(data, "canary")} - {"bits/byte"}
    split = _split(data, "canary")
    series = _moving(data, "canary", split, next(iter(units), ""))
    scaled: dict[str, list[Point]] = {}
    for name, points in series.items():
        if first := points[0][1]:
            scaled[name] = [
                (step, 100 * (value - first) / first, 100 * (error or 0.0) / first)
                for step, value, error in points
            ]
    layout: dict[str, Any] = two_panels(False, "change, %", "")
    rows = data.verdict.rows if data.verdict else ()
    margins = {r.margin_text for r in rows if r.kind == "canary"}
    if len(margins) == 1 and (text := margins.pop()).endswith("%"):
        layout["shapes"] = [line_at("y", float(text[:-1]))]
        layout["annotations"] = [note_at("y", float(text[:-1]), f"margin {text}")]
    _mark_alarms(data, "canary/", layout)
    caption = (
        "Loss on held-out text of the base's kind, against its first reading; "
        f"{split} split. {INTERVALS}"
    )
    return _figure("canary", "Canary loss by domain", caption, scaled, layout)


def probes(data: ReportData) -> Figure | None:
    """Accuracy by probe: on the selection half where that is looked at, else before and after."""
    split = _split(data, "probe")
    series: dict[str, list[Point]] = {
        name: [(step, 100 * value, 100 * (error or 0.0)) for step, value, error in points]
        for name, points in _moving(data, "probe", split, "accuracy").items()
    }
    layout = two_panels(False, "accuracy, %", "")
    _mark_alarms(data, "probe/", layout)
    caption = f"Accuracy by probe; {split} split. {INTERVALS}"
    return _figure("probes", "Probes during training", caption, series, layout)


def other(data: ReportData, meter: str, unit: str) -> Figure | None:
    """Any other meter, in its own unit; of what is read part by part the whole only."""
    series = _moving(data, meter, None, unit)
    if meter in BY_PART:
        series = {name: points for name, points in series.items() if name == "total"}
    moved = sorted(series, key=lambda name: -abs(series[name][-1][1] - series[name][0][1]))
    shown = {name: series[name] for name in series if name in moved[:MOST]}
    left = f" The {MOST} of {len(series)} that moved furthest." * (len(shown) < len(series))
    title = f"{meter.replace('_', ' ').capitalize()} over steps"
    key = "-".join(filter(None, (meter, *unit.split())))
    layout, about = two_panels(False, unit or meter, ""), INTERVALS
    if meter == "evidence":
        about = "What is held against each guardrail, as a share of what raises an alarm."
        layout["shapes"] = [line_at("y", 1.0)]
        layout["annotations"] = [note_at("y", 1.0, "alarm")]
        _mark_alarms(data, "", layout)
    return _figure(key, title, f"{about}{left}", shown, layout)


def _mark_alarms(data: ReportData, prefix: str, layout: dict[str, Any]) -> None:
    """A line at each step at which one was raised, of names that begin so, with the names."""
    names: dict[int, list[str]] = {}
    for reading in of_meter(data, "alarm"):
        if (name := str(reading["name"])).startswith(prefix):
            names.setdefault(int(reading["step"]), []).append(name.removeprefix(prefix))
    for step, raised in sorted(names.items()):
        layout.setdefault("shapes", []).append(line_at("x", step))
        note = note_at("x", step, escape(f"alarm: {', '.join(raised)}"))
        layout.setdefault("annotations", []).append(note)


def _split(data: ReportData, meter: str) -> str:
    """The split that may be looked at, where it was read; else the first there is."""
    splits = {str(r.get("split")) for r in of_meter(data, meter)}
    return "selection" if "selection" in splits else next(iter(sorted(splits)), "")


def _moving(data: ReportData, meter: str, split: str | None, unit: str) -> dict[str, list[Point]]:
    """Series of more than one step."""
    series = series_of(data, meter, split=split, unit=unit)
    return {name: points for name, points in series.items() if len(points) > 1}


def _figure(
    key: str, title: str, caption: str, series: dict[str, list[Point]], layout: dict[str, Any]
) -> Figure | None:
    traces: list[Trace] = []
    for i, (name, points) in enumerate(series.items()):
        colour = PALETTE[i % len(PALETTE)]
        trace = curve(name, points, colour)
        trace["mode"] = "lines+markers"
        trace["error_y"] = {
            "type": "data", "array": [finite(Z * (error or 0.0)) for _, _, error in points],
            "thickness": 1, "width": 3, "color": faint(colour),
        }  # fmt: skip
        traces.append(trace)
    return make_figure(key, title, caption, traces, layout, wide=True)
