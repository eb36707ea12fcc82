"""The picture of a sweep: each trial's target against its worst guardrail; one page, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Protocol

from holdfast.report.draw import LEGEND, MUTED, PALETTE, finite, line_at, note_at


class Tried(Protocol):
    """A trial as it is drawn."""

    @property
    def number(self) -> int:
        """Its place in the search."""

    @property
    def target(self) -> float:
        """What was learned."""

    @property
    def worst(self) -> float:
        """Largest fall of a guardrail, in margins."""

    @property
    def culprit(self) -> str:
        """Whose it is."""

    @property
    def words(self) -> str:
        """The settings that were searched over."""


def picture(trials: Sequence[Tried], frontier: Sequence[Tried], recommended: Tried | None) -> str:
    """An HTML page with plotly in it."""
    import plotly.graph_objects as go

    rest = [one for one in trials if one not in frontier]
    chosen = [] if recommended is None else [recommended]
    figure = go.Figure(layout={
        "title": {"text": "Sweep: what is learned against what is forgotten"},
        "xaxis": {"title": {"text": "target (selection split)"}},
        "yaxis": {"title": {"text": "worst fall, in margins"}},
        "shapes": [line_at("y", 1)],
        "annotations": [note_at("y", 1, "margin")],
        "legend": LEGEND,
        "template": None,
    })  # fmt: skip
    for name, some, look in (
        ("trials", rest, {"mode": "markers", "marker": {"color": MUTED, "size": 8}}),
        ("frontier", frontier, {"mode": "lines+markers",
                                "marker": {"color": PALETTE[0], "size": 9}}),
        ("recommended", chosen, {"mode": "markers",
                                 "marker": {"color": PALETTE[1], "size": 15, "symbol": "star"}}),
    ):  # fmt: skip
        figure.add_scatter(
            name=name,
            x=[one.target for one in some],
            y=[finite(one.worst) for one in some],
            hovertext=[escape(f"trial {one.number}: {one.words}; {one.culprit}") for one in some],
            **look,
        )
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page
