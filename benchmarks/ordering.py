"""Theory's order of the levers beside the lab's: what each forgets at equal learning.

    python benchmarks/ordering.py --cells benchmarks/results/2026-11-25-levers.jsonl

Predicted: `holdfast theory`'s random pairs of tasks with that command's own defaults, which stood
before the lab was asked, at the share of the lesson that is learned at that loss; the order is that
of the mean place. Measured: the rise of the canary at that loss (`benchmarks/levers.py`), mean over
the seeds. Kendall's tau-b allows for ties; p is two-sided, of no association; the interval is of
2,000 resamplings of each arm's seeds, so it knows the seeds' noise and not that the levers are few.

Theory turns a lever's strength until it ends at that loss. The lab leaves the strength and stops
there, and its low rank is LoRA, which chooses its directions while theory's are random.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau, rankdata

from holdfast.cli.theory import Draws, theory_tables
from levers import EQUAL, NAIVE_ARM, REWIND, at_equal_loss, read_cells

ARM_OF = {
    "replay": "replay, ntp",
    "kl_anchor": "default stack",
    "l2_sp": "l2_sp",
    "ewc": "ewc",
    "low_rank": "adapter (all-linear)",
    "budget": NAIVE_ARM,  # on its way, it is stopped early
    "rewind": REWIND,
}
DRAWS = Draws(count=50, dim=16, overlap=0.5, fisher_noise=1.0, seed=0)
RESAMPLED = 2000


def main(
    cells: Annotated[Path, typer.Option(help="What benchmarks/levers.py wrote.")],
    loss: Annotated[float, typer.Option(help="Held-out lesson loss to compare at.")] = EQUAL,
) -> None:
    """Print both orders and how far they agree."""
    done = [cell for cell in read_cells(cells) if not cell["tuning"]]
    learnt = 1 - loss / mean(cell["path"][0][1] for cell in done if cell["arm"] == NAIVE_ARM)
    table = theory_tables(learnt, DRAWS)["draws"]["levers"]
    predicted = {row["lever"]: row for row in table}
    rises: dict[str, list[float]] = {}
    for lever, arm in ARM_OF.items():
        found = [at_equal_loss(cell, loss) for cell in done if cell["arm"] == arm]
        rises[lever] = [rise for rise in found if rise is not None]
    missing = [lever for lever, found in rises.items() if not found]
    levers = [lever for lever in predicted if lever not in missing]
    places = [predicted[lever]["mean_place"] for lever in levers]
    measured = [mean(rises[lever]) for lever in levers]
    shown = Table(title=f"forgetting at {learnt:.0%} of the lesson learnt, the least first")
    for column in ("lever", "arm on the lab", "predicted", "over the least", "measured"):
        shown.add_column(column)
    shown.add_column("canary rise (of seeds)")
    ranks = zip(rankdata(places, "min"), rankdata(measured, "min"), strict=True)
    for lever, (place, found) in zip(levers, ranks, strict=True):
        spread = f" ± {np.std(rises[lever], ddof=1):.1%}" if len(rises[lever]) > 1 else ""
        shown.add_row(
            lever,
            ARM_OF[lever],
            f"{place:.0f}",
            f"{predicted[lever]['median'] or np.inf:.2f}",
            f"{found:.0f}",
            f"{mean(rises[lever]):+.1%}{spread} (of {len(rises[lever])})",
        )
    Console(width=120).print(shown)
    tau, p = kendalltau(places, measured)
    random = np.random.default_rng(0)
    again = [
        kendalltau(places, [mean(random.choice(rises[one], len(rises[one]))) for one in levers])[0]
        for _ in range(RESAMPLED)
    ]
    low, high = np.quantile(again, (0.025, 0.975))
    several = any(len(found) > 1 for found in rises.values())
    interval = f"[{low:+.2f}, {high:+.2f}] over the seeds" if several else "(one seed, no interval)"
    print(
        f"Kendall's tau-b {tau:+.2f} {interval}, p = {p:.2f} for no association, "
        f"{len(levers)} levers"
    )
    if missing:
        print(f"never at {loss:g} nats, or not run: {', '.join(missing)}")


if __name__ == "__main__":
    typer.run(main)
