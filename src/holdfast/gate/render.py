"""Rows of a verdict as words, as a terminal table and as Markdown.

Accuracies are shown in percent and their differences in points (pt); losses in nats.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from holdfast.gate.margins import lower_is_better

if TYPE_CHECKING:
    from rich.table import Table

    from holdfast.gate.verdict import GateResult, Row

HEADINGS = ("capability", "kind", "n", "before", "after", "change", "margin", "verdict", "why")
_COLOUR = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}


def show_value(value: float, stderr: float, unit: str) -> str:
    """`71.2% ± 1.4` or `2.314 ± 0.021`; a dash where there is no value."""
    if not math.isfinite(value):
        return "—"
    scale, digits, sign = (100, 1, "%") if unit == "accuracy" else (1, 3, "")
    error = f" ± {scale * stderr:.{digits}f}" if math.isfinite(stderr) else ""
    return f"{scale * value:.{digits}f}{sign}{error}"


def show_difference(value: float, unit: str) -> str:
    """A signed difference: `-2.1pt`, `+0.0130`; a real minus sign is left to the typesetter."""
    if math.isnan(value):
        return "—"
    if math.isinf(value):
        return "+inf" if value > 0 else "-inf"
    return f"{100 * value:+.1f}pt" if unit == "accuracy" else f"{value:+.4f}"


def show_interval(row: Row) -> str:
    """`[-1.7pt, +0.9pt]`."""
    if math.isnan(row.difference):
        return ""
    lower, upper = (show_difference(bound, row.unit) for bound in (row.lower, row.upper))
    return f"[{lower}, {upper}]"


def show_margin(row: Row) -> str:
    """The margin as the recipe writes it, and for a loss in nats as well; a target must rise."""
    if row.kind == "target" and row.margin is None:
        return "must rise" if row.decisive else "should rise"
    if row.margin is not None and lower_is_better(row.unit):
        return f"{row.margin_text} ({row.margin:.4f})"
    return row.margin_text or "—"


def show_verdict(row: Row) -> str:
    """The verdict; rows that do not count say so."""
    return str(row.verdict) if row.decisive else f"{row.verdict} (reported only)"


def explain(row: Row) -> str:
    """Why a compared row has its verdict, in the reader's units."""
    falls = not lower_is_better(row.unit)
    bad, good = ("fall", "rise") if falls else ("rise", "fall")
    worst = row.lower if falls else row.upper
    mildest = row.upper if falls else row.lower
    verdict = str(row.verdict)
    if row.kind == "target":
        if verdict == "PASS":
            return f"{good} of at least {_size(worst, row)}"
        if verdict == "FAIL":
            return f"no {good}: at best {show_difference(mildest, row.unit)}"
        return f"a {good} is not shown{_more(row)}"
    if verdict == "PASS":
        harmless = worst >= 0 if falls else worst <= 0
        return f"no {bad}" if harmless else f"{bad} of at most {_size(worst, row)}"
    if verdict == "FAIL":
        size, least = _size(row.difference, row), _size(mildest, row)
        return f"{bad} of {size}, at least {least}, beyond the margin of {row.margin_text}"
    return f"the {bad} may reach {_size(worst, row)}{_more(row)}"


def _size(value: float, row: Row) -> str:
    """`2.1pt`, or `0.0130 nats (0.5%)`, relative to the base as a loss's margin is."""
    size = show_difference(abs(value), row.unit).lstrip("+")
    if row.unit == "accuracy":
        return size
    size = f"{size} {row.unit}"
    return f"{size} ({abs(value) / row.before:.2%})" if row.before else size


def _more(row: Row) -> str:
    if row.items_needed is None:
        return f" ({row.n} items)"
    return f"; about {row.items_needed:,} items would decide ({row.n:,} read)"


def cells(row: Row) -> tuple[str, ...]:
    """The row under `HEADINGS`."""
    return (
        row.name,
        row.kind,
        f"{row.n:,}",
        show_value(row.before, row.before_stderr, row.unit),
        show_value(row.after, row.after_stderr, row.unit),
        f"{show_difference(row.difference, row.unit)} {show_interval(row)}".strip(),
        show_margin(row),
        show_verdict(row),
        row.reason,
    )


def confidence(result: GateResult) -> str:
    """What the brackets mean."""
    return (
        f"Change: after minus before on the same items, with one-sided "
        f"{100 * (1 - result.alpha):.4g}% "
        "bounds in brackets; accuracies in points, losses in nats (a rise is worse)."
    )


def rich_table(result: GateResult) -> Table:
    """A table for the terminal, readable at 80 columns: an error stands below its value."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    colour = _COLOUR[str(result.verdict)]
    undecided = [row for row in result.rows if row.decisive and row.verdict != "PASS"]
    reasons = [f"{row.name} ({row.kind}): {row.reason}" for row in undecided]
    table = Table(
        title=f"[{colour}]{escape(result.reason)}[/]",
        caption=escape("\n".join([*reasons, confidence(result)])),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        show_lines=True,
        pad_edge=False,
    )
    for heading in ("capability", "before", "after", "change", "margin", "verdict"):
        numeric = heading in ("before", "after", "change", "margin")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in result.rows:
        name, kind, n, before, after, change, margin, verdict, _ = map(escape, cells(row))
        shade = _COLOUR[str(row.verdict)] if row.decisive else "dim"
        table.add_row(
            f"{name}\n[dim]{kind}, n {n}[/]",
            *(cell.replace(" ", "\n", 1) for cell in (before, after, change, margin)),
            f"[{shade}]{verdict.replace(' ', chr(10), 1)}[/]",
        )
    return table


def markdown_table(result: GateResult) -> str:
    """A Markdown table with the sentence above and the legend below."""
    lines = [f"**{escape_markdown(result.reason)}**", ""]
    if result.rows:
        lines += [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
        lines += [_line([escape_markdown(cell) for cell in cells(row)]) for row in result.rows]
        lines += ["", confidence(result)]
    return "\n".join(lines) + "\n"


def _line(values: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(values)} |"


def escape_markdown(text: str) -> str:
    """Names come from users: no pipe, backtick, tag or newline of theirs may shape the page."""
    for mark in "\\|*_`[]<>":
        text = text.replace(mark, f"&#{ord(mark)};" if mark in "<>" else f"\\{mark}")
    return " ".join(text.split())
