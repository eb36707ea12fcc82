"""One self-contained page of a run: the verdict in a sentence, then what it rests on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from holdfast.files import write_text
from holdfast.gate import render
from holdfast.gate.margins import UNIT_OF
from holdfast.report.data import ReportData, duration, flat, plain, show
from holdfast.report.figures import all_figures
from holdfast.report.trajectories import BY_PART

__all__ = ["ReportData", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"
_MARK = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?", "NONE": "·"}
_OWN_PLACE = ("seconds", "refused_steps", "alarms")
"""Entries of the summary that are not in its list."""
_NOT_LISTED = ("loss", "grad_norm", "learning_rate", "refused_steps", "alarm")
"""Meters of training itself: drawn, not listed."""


def write_report(run_dir: Path, data: ReportData) -> Path:
    """Write `report.html`: no file beside it, no network; plotly.js is inside."""
    return write_text(run_dir / "report.html", render_page(data))


def render_page(data: ReportData) -> str:
    """The page as HTML. Every text is escaped: names in a recipe are data, never markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = all_figures(data)
    specs = {figure.key: figure.spec for figure in figures}
    return environment.get_template("report.html.j2").render(
        title=data.title,
        verdict=str(data.verdict.verdict) if data.verdict else "NONE",
        sentence=_sentence(data),
        mark=_MARK,
        capabilities=_capabilities(data),
        legend=render.confidence(data.verdict) if data.verdict else "",
        facts=_facts(data),
        readings=_readings(data),
        worst=data.worst,
        figures=figures,
        specs=Markup(_inside_script(specs)),
        plotlyjs=Markup(get_plotlyjs()) if figures else "",
        refused=data.refused_steps(),
        alarms=data.summary.get("alarms") or [],
        recipe=yaml.safe_dump(plain(data.recipe), sort_keys=False, allow_unicode=True, width=88),
        streams=_streams(data),
        environment=flat(data.environment),
    )


def _sentence(data: ReportData) -> str:
    """The verdict's words without its name, which the page shows as a badge."""
    if data.verdict is None:
        return data.about or "No gate ran: nothing is promised about what this model forgot."
    name = str(data.verdict.verdict)
    return data.verdict.reason.removeprefix(f"{name}:").strip()


def _capabilities(data: ReportData) -> list[dict[str, Any]]:
    """The rows of the verdict as the table shows them."""
    return [
        {
            "name": row.name,
            "about": f"{row.kind}, {row.n:,} items" if row.n else row.kind,
            "before": render.show_value(row.before, row.before_stderr, row.unit),
            "after": render.show_value(row.after, row.after_stderr, row.unit),
            "change": render.show_difference(row.difference, row.unit),
            "interval": render.show_interval(row),
            "margin": render.show_margin(row),
            "verdict": str(row.verdict),
            "decisive": row.decisive,
            "reason": row.reason,
        }
        for row in (data.verdict.rows if data.verdict else ())
    ]


def _readings(data: ReportData) -> list[dict[str, Any]]:
    """The first and the last reading of everything but training's own meters and single tensors."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for reading in data.readings:
        meter, name = str(reading.get("meter", "")), str(reading.get("name", ""))
        if meter not in _NOT_LISTED and (meter not in BY_PART or name == "total"):
            key = (meter, name, str(reading.get("split", "")))
            found.setdefault(key, []).append(reading)
    rows = []
    for (meter, name, split), readings in sorted(found.items()):
        in_order = sorted(readings, key=lambda r: int(r.get("step", 0)))
        rows.append(
            {
                "meter": meter.replace("_", " "),
                "name": name,
                "split": split,
                "first": _value(in_order[0]) if len(in_order) > 1 else "",
                "last": _value(in_order[-1]),
                "unit": in_order[-1].get("unit") or "",
                "n": show(in_order[-1].get("n")),
            }
        )
    return rows


def _value(reading: dict[str, Any]) -> str:
    value, stderr = reading.get("value"), reading.get("stderr")
    given = [math.nan if number is None else float(number) for number in (value, stderr)]
    unit = str(reading.get("unit") or "")
    if unit in UNIT_OF:
        return render.show_value(given[0], given[1], unit)
    error = f" ± {given[1]:.2g}" if math.isfinite(given[1]) else ""
    return f"{given[0]:.4g}{error}" if math.isfinite(given[0]) else "—"


def _facts(data: ReportData) -> list[tuple[str, str]]:
    """The line of figures under the verdict: wall time first."""
    seconds = data.summary.get("seconds")
    facts = [("took", duration(float(seconds)))] if seconds is not None else []
    rest = {key: value for key, value in data.summary.items() if key not in _OWN_PLACE}
    if "refused_steps" in data.summary:
        rest["refused steps"] = len(data.refused_steps())
    return facts + [(name.replace("_", " "), text) for name, text in flat(rest)]


def _streams(data: ReportData) -> dict[str, Any]:
    """The streams as a table: columns are whatever any of them has."""
    rows = data.stream_rows()
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    return {
        "columns": columns,
        "rows": [
            (name, [show(plain(row.get(column))) for column in columns]) for name, row in rows
        ],
    }


def _inside_script(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
