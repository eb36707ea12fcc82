"""The report's figures, each a plotly figure made of readings or verdict rows.

Colours that depend on light or dark (text, grid, paper) are left out: the page sets them.
Names come from users, and plotly reads some HTML in text, so names are escaped.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

from holdfast.gate.margins import lower_is_better
from holdfast.report.data import ReportData
from holdfast.report.draw import (
    LEGEND,
    MUTED,
    PALETTE,
    VERDICT_COLOUR,
    Figure,
    Trace,
    curve,
    faint,
    finite,
    label,
    line_at,
    make_figure,
    natural,
    note_at,
    of_meter,
    series_of,
    two_panels,
)

if TYPE_CHECKING:
    from holdfast.gate.verdict import GateResult


def all_figures(data: ReportData) -> list[Figure]:
    """Every figure there are readings for, in the order of the page."""
    rows = data.verdict
    drawn = [
        *([changes(rows), accuracies(rows)] if rows else []),
        training_loss(data),
        over_steps(data, "canary", rows),
        over_steps(data, "probe", rows),
        displacement(data),
        optimizer(data),
        token_budget(data),
    ]
    return [figure for figure in drawn if figure is not None]


def changes(result: GateResult) -> Figure | None:
    """Each guardrail's change in units of its margin: -1 is the whole margin lost."""
    rows = [r for r in result.rows if r.margin and math.isfinite(r.difference)]
    if not rows:
        return None
    traces: list[Trace] = []
    for verdict, colour in VERDICT_COLOUR.items():
        mine = [r for r in rows if r.verdict == verdict]
        if not mine:
            continue
        gains = []
        for r in mine:
            assert r.margin is not None
            sign = -1 if lower_is_better(r.unit) else 1
            ends = sorted((sign * r.lower / r.margin, sign * r.upper / r.margin))
            gains.append((sign * r.difference / r.margin, *ends))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": verdict,
                "x": [finite(x) for x, _, _ in gains],
                "y": [label(r.name, r.meter, rows) for r in mine],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [finite(high - x) for x, _, high in gains],
                    "arrayminus": [finite(x - low) for x, low, _ in gains],
                    "thickness": 2,
                    "width": 4,
                },
                "marker": {
                    "size": 10,
                    "color": colour,
                    "symbol": ["circle" if r.decisive else "circle-open" for r in mine],
                },
            }
        )
    layout = {
        "xaxis": {"title": {"text": "change, in margins"}, "zeroline": True},
        "yaxis": _categories([label(r.name, r.meter, rows) for r in rows]),
        "shapes": [line_at("x", -1)],
        "annotations": [note_at("x", -1, "margin")],
        "height": 150 + 32 * len(rows),
        "legend": LEGEND,
    }
    caption = (
        "Right of the dashed line is within the margin. A guardrail passes when its whole bar is "
        "right of the line, and fails when its whole bar is left of it. Hollow: reported only."
    )
    return make_figure("changes", "Change against margin", caption, traces, layout)


def accuracies(result: GateResult) -> Figure | None:
    """Before and after of every accuracy, with 95 % intervals."""
    rows = [r for r in result.rows if r.unit == "accuracy" and math.isfinite(r.difference)]
    if not rows:
        return None
    names = [label(r.name, r.meter, rows) for r in rows]
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": when,
            "x": [finite(100 * value) for value, _ in points],
            "y": names,
            "error_x": {
                "type": "data",
                "array": [finite(196 * error) for _, error in points],
                "thickness": 1.5,
                "width": 3,
            },
            "marker": {"size": 9, "color": colour, "symbol": symbol},
        }
        for when, colour, symbol, points in (
            ("before", MUTED, "circle-open", [(r.before, r.before_stderr) for r in rows]),
            ("after", PALETTE[0], "circle", [(r.after, r.after_stderr) for r in rows]),
        )
    ]
    layout = {
        "xaxis": {"title": {"text": "accuracy, %"}},
        "yaxis": _categories(names),
        "height": 150 + 32 * len(rows),
        "scattermode": "group",
        "legend": LEGEND,
    }
    caption = (
        "Bars are 95 % intervals of each reading by itself. Both models answer the same items, so "
        "the change is known better than either: see the table."
    )
    return make_figure("accuracies", "Accuracy before and after", caption, traces, layout)


def training_loss(data: ReportData) -> Figure | None:
    """Task and total above, every other term below: they differ by orders of magnitude."""
    series = series_of(data, "loss")
    large = [name for name in series if name in ("task", "total")]
    small = [name for name in series if name not in large]
    traces = [
        curve(name, series[name], PALETTE[i % len(PALETTE)], axis="y" if name in large else "y2")
        for i, name in enumerate([*large, *small])
    ]
    for trace in traces:
        if trace["name"] == "total":
            trace["line"] |= {"dash": "dot", "color": MUTED}
    layout = two_panels(bool(large) and bool(small), "task, total (nats)", "other terms (nats)")
    if not large:
        layout, traces = two_panels(False, "nats", ""), [{**t, "yaxis": "y"} for t in traces]
    caption = "Weighted terms as they enter the step, per token."
    return make_figure("loss", "Training loss by term", caption, traces, layout, wide=True)


def over_steps(data: ReportData, meter: str, result: GateResult | None) -> Figure | None:
    """Canaries in percent of their first reading, probes in percent accuracy, over steps."""
    canary = meter == "canary"
    unit = "nats" if canary else "accuracy"
    splits = {r.get("split") for r in of_meter(data, meter)}
    split = "selection" if "selection" in splits else next(iter(sorted(map(str, splits))), "")
    series = {
        name: points
        for name, points in series_of(data, meter, split=split, unit=unit).items()
        if len(points) > 1
    }
    traces: list[Trace] = []
    for i, (name, points) in enumerate(series.items()):
        colour = PALETTE[i % len(PALETTE)]
        first = points[0][1] if canary else 1.0
        if not first:
            continue
        shift = first if canary else 0.0
        scaled = [(s, 100 * (v - shift) / first, 100 * (e or 0.0) / first) for s, v, e in points]
        trace = curve(name, scaled, colour)
        trace["mode"] = "lines+markers"
        trace["error_y"] = {
            "type": "data", "array": [finite(e) for _, _, e in scaled],
            "thickness": 1, "width": 3, "color": faint(colour),
        }  # fmt: skip
        traces.append(trace)
    layout: dict[str, Any] = two_panels(False, "change, %" if canary else "accuracy, %", "")
    margins = {r.margin_text for r in result.rows if r.kind == "canary"} if result else set()
    if canary and len(margins) == 1 and (text := margins.pop()).endswith("%"):
        layout["shapes"] = [line_at("y", float(text[:-1]))]
        layout["annotations"] = [note_at("y", float(text[:-1]), f"margin {text}")]
    of = f"{split} split; bars are one standard error of each reading by itself."
    if canary:
        caption = f"Loss on held-out text of the base's kind, against its first reading; {of}"
        return make_figure("canary", "Canary loss by domain", caption, traces, layout, wide=True)
    title = "Probes during training"
    return make_figure("probes", title, f"Accuracy by probe; {of}", traces, layout, wide=True)


def displacement(data: ReportData) -> Figure | None:
    """How far each layer's weights moved, at the last reading."""
    last = {name: points[-1][1] for name, points in series_of(data, "drift").items()}
    total = last.pop("total", None)
    names = sorted(last, key=natural)
    trace = {
        "type": "bar",
        "x": [escape(name) for name in names],
        "y": [finite(last[name]) for name in names],
        "marker": {"color": PALETTE[5]},
    }
    layout = {
        "xaxis": {"type": "category", "showticklabels": len(names) <= 32, "automargin": True},
        "yaxis": {"title": {"text": "|change| / |start|"}, "rangemode": "tozero"},
        "showlegend": False,
        "height": 440,
    }
    caption = "Norm of the weights' change over the norm of the weights."
    if total is not None:
        caption += f" All together: {total:.3g}."
    return make_figure("drift", "Displacement by layer", caption, [trace] if names else [], layout)


def optimizer(data: ReportData) -> Figure | None:
    """Gradient norm with the refused steps marked, and the learning rate."""
    norms = [p for points in series_of(data, "grad_norm").values() for p in points]
    rates = [p for points in series_of(data, "learning_rate").values() for p in points]
    traces: list[Trace] = []
    if norms:
        traces.append(curve("gradient norm", norms, PALETTE[2]))
    refused = data.refused_steps()
    if refused:
        height = {s: v for s, v, _ in norms}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "refused step",
                "x": [step for step, _ in refused],
                "y": [finite(height.get(step, 0.0)) or 0.0 for step, _ in refused],
                "text": [escape(reason) for _, reason in refused],
                "marker": {"symbol": "x", "size": 9, "color": VERDICT_COLOUR["FAIL"]},
            }
        )
    both = bool(traces) and bool(rates)
    if rates:
        traces.append(curve("learning rate", rates, PALETTE[1], axis="y2" if both else "y"))
    layout = two_panels(both, "gradient norm" if norms or refused else "rate", "learning rate")
    if rates:
        layout["yaxis2" if both else "yaxis"]["exponentformat"] = "e"
    told = f"{len(refused)} refused: not finite, or beyond a cap." if refused else "None refused."
    return make_figure(
        "optimizer", "Gradient norm and learning rate", f"Steps: {told}", traces, layout
    )


def token_budget(data: ReportData) -> Figure | None:
    """Tokens by stream."""
    rows = [(name, row.get("tokens")) for name, row in data.stream_rows()]
    known = [(name, float(n)) for name, n in rows if isinstance(n, (int, float)) and n > 0]
    total = sum(n for _, n in known)
    traces: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": escape(name),
            "x": [n],
            "y": [""],
            "text": [f"{n / total:.0%}"],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "marker": {"color": PALETTE[i % len(PALETTE)]},
        }
        for i, (name, n) in enumerate(known)
    ]
    layout = {
        "barmode": "stack",
        "height": 190,
        "xaxis": {"title": {"text": "tokens"}},
        "yaxis": {"showticklabels": False},
        "legend": LEGEND | {"traceorder": "normal"},
    }
    caption = "Tokens the model trained on."
    return make_figure("tokens", "Token budget by stream", caption, traces, layout, wide=True)


def _categories(names: list[str]) -> dict[str, Any]:
    """An axis of names, from the top in this order."""
    return {
        "autorange": "reversed",
        "automargin": True,
        "type": "category",
        "categoryorder": "array",
        "categoryarray": names,
    }
