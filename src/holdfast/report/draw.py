"""The parts figures are made of: palette, panels, curves, and readings as series."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from holdfast.report.data import ReportData

PALETTE = ("#4c7fd9", "#d9822b", "#2ca089", "#c25b9a", "#8f7a3d", "#7a6fd0", "#5b9bb5", "#b5564e")
"""Told apart on light and on dark paper; no pair differs by red against green alone."""
VERDICT_COLOUR = {"PASS": "#2b9a66", "FAIL": "#d64545", "INCONCLUSIVE": "#c98a1b"}
MUTED = "#8b95a5"

Trace = dict[str, Any]
Point = tuple[int, float, float | None]
"""(step, value, standard error)"""


@dataclass(frozen=True)
class Figure:
    """A drawn figure: plotly's JSON, and the words around it."""

    key: str
    title: str
    caption: str
    spec: dict[str, Any]
    wide: bool = False


LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


def make_figure(
    key: str,
    title: str,
    caption: str,
    traces: Sequence[Trace],
    layout: dict[str, Any],
    wide: bool = False,
) -> Figure | None:
    """Have plotly check every attribute, and keep the result as plain JSON; None without data."""
    if not traces:
        return None
    import json

    import plotly.graph_objects as go

    layout = {"height": 330, "margin": {"l": 60, "r": 16, "t": 36, "b": 48}} | layout
    figure = go.Figure(list(traces), layout | {"template": None})
    return Figure(key, title, caption, json.loads(figure.to_json()), wide)


def two_panels(two: bool, upper: str, lower: str) -> dict[str, Any]:
    """Layout over steps: one panel, or two above each other on one axis of steps."""
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "step"}, "zeroline": False},
        "yaxis": {"title": {"text": upper}, "automargin": True},
        "showlegend": True,
        "hovermode": "x unified",
        "legend": LEGEND,
    }
    if two:
        layout["yaxis"]["domain"] = [0.48, 1.0]
        layout["yaxis2"] = {"title": {"text": lower}, "domain": [0.0, 0.38], "automargin": True}
        layout["xaxis"]["anchor"] = "y2"
        layout["height"] = 440
    return layout


def curve(name: str, points: Iterable[Point], colour: str, axis: str = "y") -> Trace:
    """A line over steps."""
    points = list(points)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escape(name),
        "x": [step for step, _, _ in points],
        "y": [finite(value) for _, value, _ in points],
        "yaxis": axis,
        "line": {"width": 2, "color": colour},
    }


def of_meter(data: ReportData, meter: str) -> list[dict[str, Any]]:
    """The readings of one meter."""
    return [reading for reading in data.readings if reading.get("meter") == meter]


def series_of(
    data: ReportData, meter: str, *, split: str | None = None, unit: str | None = None
) -> dict[str, list[Point]]:
    """(step, value, stderr) by name, in order of steps; a step read twice keeps its last value."""
    found: dict[str, dict[int, Point]] = {}
    for reading in of_meter(data, meter):
        if split is not None and reading.get("split") != split:
            continue
        if unit is not None and reading.get("unit") not in (unit, "", None):
            continue
        value, step = reading.get("value"), int(reading.get("step", 0))
        number = math.nan if value is None else float(value)
        name = str(reading.get("name", ""))
        found.setdefault(name, {})[step] = (step, number, reading.get("stderr"))
    return {name: [points[s] for s in sorted(points)] for name, points in found.items()}


def label(name: str, meter: str, rows: Sequence[Any]) -> str:
    """The name, with its meter where two share it."""
    shared = sum(row.name == name for row in rows) > 1
    return escape(f"{meter}/{name}" if shared else name)


def finite(value: float) -> float | None:
    """The value, or None, which plotly draws as a gap."""
    return value if math.isfinite(value) else None


def faint(colour: str) -> str:
    """A `#rrggbb` colour, half seen through: for error bars."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.6)"


def line_at(axis: str, value: float) -> dict[str, Any]:
    """A dashed line across the panel: the margin."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1}
    line = {"dash": "dash", "width": 1.5, "color": VERDICT_COLOUR["FAIL"]}
    return {"type": "line", f"{other}ref": "paper", **ends, "line": line}


def note_at(axis: str, value: float, text: str) -> dict[str, Any]:
    """A word at the end of such a line."""
    other = "y" if axis == "x" else "x"
    return {
        axis: value,
        other: 1,
        f"{other}ref": "paper",
        "text": text,
        "showarrow": False,
        "xanchor": "right",
        "yanchor": "top" if axis == "x" else "bottom",
        "font": {"size": 11, "color": VERDICT_COLOUR["FAIL"]},
    }


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name) if p]
