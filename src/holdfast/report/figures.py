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
    finite,
    label,
    line_at,
    make_figure,
    natural,
    note_at,
    series_of,
    two_panels,
)
from holdfast.report.frontier import frontier
from holdfast.report.trajectories import trajectories

if TYPE_CHECKING:
    from holdfast.gate.verdict import GateResult


def all_figures(data: ReportData) -> list[Figure]:
    """Every figure there are readings for, in the order of the page."""
    rows = data.verdict
    drawn = [
        frontier(data.frontier, data.beside),
        *([changes(rows), accuracies(rows)] if rows else []),
        training_loss(data),
        *trajectories(data),
        displacement(data),
        ranks(data),
        routing(data),
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


def displacement(data: ReportData) -> Figure | None:
    """How far each layer's weights moved, at the last reading; tensor by tensor without layers."""
    last = _last(data, "drift")
    total = last.pop("total", None)
    blocks = _last(data, "drift_block")
    caption = "Norm of the weights' change over the norm of the weights."
    if total is not None:
        caption += f" All together: {total:.3g}."
    traces = [_bars("", blocks or last, PALETTE[5])] if blocks or last else []
    layout = _by_layer(blocks or last, "|change| / |start|") | {"showlegend": False}
    return make_figure("drift", "Displacement by layer", caption, traces, layout)


def ranks(data: ReportData) -> Figure | None:
    """In how many directions each matrix was changed, at the last reading."""
    kinds = {kind: _last(data, f"{kind}_rank") for kind in ("effective", "stable")}
    traces = [
        _bars(f"{kind} rank", values, PALETTE[i])
        for i, (kind, values) in enumerate(kinds.items())
        if values
    ]
    layout = _by_layer(kinds["effective"] | kinds["stable"], "rank of the change")
    caption = (
        "Effective rank: how many directions the change of a matrix has, weighed by their size; "
        "stable rank: its square norm over that of its largest direction."
    )
    return make_figure("ranks", "Rank of the change by matrix", caption, traces, layout)


def routing(data: ReportData) -> Figure | None:
    """How differently each layer of a mixture routes each domain, at the last reading."""
    series = series_of(data, "routing")
    domains = [n for n in series if any(other.startswith(f"{n}/") for other in series)]
    traces: list[Trace] = []
    layers: dict[str, float] = {}
    for i, domain in enumerate(domains):
        last = {
            name.removeprefix(f"{domain}/"): points[-1]
            for name, points in series.items()
            if name.startswith(f"{domain}/")
        }
        values = {layer: value for layer, (_, value, _) in last.items()}
        layers |= values
        bars = _bars(escape(domain), values, PALETTE[i % len(PALETTE)])
        errors = [1.96 * (last[layer][2] or 0.0) for layer in sorted(values, key=natural)]
        bars["error_y"] = {"type": "data", "array": [finite(e) for e in errors], "thickness": 1}
        traces.append(bars)
    changed = _last(data, "routing_changed")
    told = ", ".join(f"{name} {share:.1%}" for name, share in changed.items() if name in domains)
    caption = (
        "Jensen-Shannon divergence (nats, at most 0.693) of the experts' shares of tokens, base "
        "against tuned, with 95 % intervals."
    )
    caption += f" Tokens with another set of experts: {told}." * bool(told)
    layout = _by_layer(layers, "divergence, nats")
    return make_figure("routing", "Routing changes by layer", caption, traces, layout, wide=True)


def _last(data: ReportData, meter: str) -> dict[str, float]:
    return {name: points[-1][1] for name, points in series_of(data, meter).items()}


def _bars(name: str, values: dict[str, float], colour: str) -> Trace:
    names = sorted(values, key=natural)
    return {
        "type": "bar",
        "name": name,
        "x": [escape(one) for one in names],
        "y": [finite(values[one]) for one in names],
        "marker": {"color": colour},
    }


def _by_layer(values: dict[str, float], unit: str) -> dict[str, Any]:
    names = [escape(name) for name in sorted(values, key=natural)]
    return {
        "xaxis": {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": names,
            "showticklabels": len(names) <= 32,
            "automargin": True,
        },
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
        "height": 440,
        "legend": LEGEND,
    }


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
