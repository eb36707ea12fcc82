"""What `holdfast theory` shows: the four regimes, and the levers' order at equal learning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from holdfast.errors import RequestError
from holdfast.theory import (
    EXAMPLE,
    LEVERS,
    REGIMES,
    Place,
    TwoTasks,
    fixed_point,
    predicted_ordering,
    random_tasks,
)

UNIT = {
    "replay": "share of tokens",
    "kl_anchor": "weight",
    "l2_sp": "weight",
    "ewc": "weight",
    "low_rank": "directions, stopped early",
    "budget": "lr x steps",
    "rewind": "scale",
}
"""What a lever's strength is measured in."""

QUANTILES = (0.05, 0.5, 0.95)
"""Of the draws' forgetting; the draw nearest to each, so that none is made up between two."""


@dataclass(frozen=True)
class Draws:
    """The random pairs of tasks that the levers are compared on besides the textbook's."""

    count: int
    dim: int
    overlap: float
    fisher_noise: float
    seed: int

    def tasks(self) -> list[TwoTasks]:
        """One pair of tasks a draw; their seeds are those from `seed` on."""
        shape = {"overlap": self.overlap, "fisher_noise": self.fisher_noise}
        return [random_tasks(self.dim, seed=self.seed + i, **shape) for i in range(self.count)]


def theory_tables(learnt: float, draws: Draws) -> dict[str, Any]:
    """Regimes, the order on the textbook case, and the order over random draws, as plain values.

    Args:
        learnt: share of the lesson's loss that is gone, 0.001..0.999: levers are compared there.
        draws: the random pairs of tasks.
    """
    if not 0.001 <= learnt <= 0.999:
        raise RequestError(f"--learnt: {learnt} is not in 0.001 to 0.999; give one such as 0.84")
    left = (1 - learnt) * EXAMPLE.start
    return {
        "regimes": _regimes(),
        "ordering": {
            "learnt": learnt,
            "task_loss": left,
            "levers": [_as_record(place) for place in predicted_ordering(left)],
        },
        "draws": {**vars(draws), "levers": _over_draws(learnt, draws.tasks())},
    }


def print_theory(found: dict[str, Any], console: Console) -> None:
    """The three tables."""
    regimes = _table("The textbook's four regimes", "regime")
    for heading in ("replay", "kl", "theta[1]", "pretraining loss", "of naive", "task loss"):
        regimes.add_column(heading, justify="right")
    for row in found["regimes"]:
        regimes.add_row(
            row["regime"],
            f"{row['replay']:g}",
            f"{row['kl_anchor']:g}",
            f"{row['theta'][1]:.3f}",
            f"{row['pretraining_rise']:.3f}",
            f"{row['of_naive']:.0%}",
            f"{row['task_loss']:.3f}",
        )
    ordering, draws = found["ordering"], found["draws"]
    learnt = f"{ordering['learnt']:.0%} of the lesson learnt"
    textbook = _table(f"The textbook case at {learnt} (task loss {ordering['task_loss']:.3f})", "#")
    textbook.add_column("lever")
    for heading in ("pretraining loss", "strength"):
        textbook.add_column(heading, justify="right")
    textbook.add_column("in")
    for row in ordering["levers"]:
        rise, strength = _shown(row["pretraining_rise"], ".3f"), _shown(row["strength"], ".3g")
        textbook.add_row(str(row["place"]), row["lever"], rise, strength, UNIT[row["lever"]])
    drawn = _table(
        f"Forgetting over the least, {draws['count']} random pairs of tasks at {learnt} "
        f"({draws['dim']} parameters, curvatures overlapping {draws['overlap']:.0%}, "
        f"EWC's diagonal off by exp({draws['fisher_noise']:g} normal))",
        "lever",
    )
    for heading in ("median", "5 %", "95 %", "first or tied", "mean place"):
        drawn.add_column(heading, justify="right")
    for row in draws["levers"]:
        ratios = [_shown(row[key], ".2f") for key in ("median", "low", "high")]
        drawn.add_row(row["lever"], *ratios, f"{row['first']:.0%}", f"{row['mean_place']:.1f}")
    for table in (regimes, textbook, drawn):
        console.print(table)
        console.print()


def _regimes() -> list[dict[str, Any]]:
    naive = EXAMPLE.pretraining_rise(fixed_point(EXAMPLE, REGIMES["naive"]))
    rows = []
    for regime, levers in REGIMES.items():
        theta_N = fixed_point(EXAMPLE, levers)
        rise = EXAMPLE.pretraining_rise(theta_N)
        rows.append(
            {
                "regime": regime,
                "replay": levers.replay,
                "kl_anchor": levers.kl_anchor,
                "theta": theta_N.tolist(),
                "pretraining_rise": rise,
                "of_naive": rise / naive,
                "task_loss": EXAMPLE.task_loss(theta_N),
            }
        )
    return rows


def _over_draws(learnt: float, drawn: list[TwoTasks]) -> list[dict[str, Any]]:
    """Each lever's forgetting over the least in its draw, and its places; the best lever first."""
    ratios: dict[str, list[float]] = {lever: [] for lever in LEVERS}
    places: dict[str, list[int]] = {lever: [] for lever in LEVERS}
    for tasks in drawn:
        ordering = predicted_ordering((1 - learnt) * tasks.start, tasks=tasks)
        least = ordering[0].point.pretraining_rise
        for place in ordering:
            ratios[place.point.lever].append(place.point.pretraining_rise / least)
            places[place.point.lever].append(place.place)
    rows = []
    for lever in LEVERS:
        low, median, high = np.quantile(ratios[lever], QUANTILES, method="nearest")
        row = {"median": _finite(median), "low": _finite(low), "high": _finite(high)}
        first, mean_place = np.mean(np.equal(places[lever], 1)), np.mean(places[lever])
        rows.append({"lever": lever, **row, "first": float(first), "mean_place": float(mean_place)})
    return sorted(rows, key=lambda row: row["mean_place"])


def _as_record(place: Place) -> dict[str, Any]:
    """A place as plain values; what the lever cannot reach is null."""
    point = place.point
    return {
        "place": place.place,
        "lever": point.lever,
        "strength": _finite(point.strength),
        "pretraining_rise": _finite(point.pretraining_rise),
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _shown(value: float | None, digits: str) -> str:
    return "out of reach" if value is None else format(value, digits)


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    return table
