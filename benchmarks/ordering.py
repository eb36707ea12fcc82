"""Theory's order of the levers beside the lab's: what each forgets at equal learning.

    python benchmarks/ordering.py

Predicted: `holdfast theory`'s random pairs of tasks with that command's own defaults, which stood
before the lab was asked, at the share of the lesson that counts as learned; the order is that of
the mean place. Measured: the mean rise of the canary of those arms of `benchmarks/forgetting` that
learned so much, each at its tuned rate, mean over the test seeds; the others are named. Kendall's
tau-b allows for ties; p is two-sided, of no association; the interval is of 2,000 resamplings of
each arm's seeds, so it knows the seeds' noise and not that the levers are few.

Theory turns a lever's strength until it ends at that loss. The lab leaves the strength and turns
the learning rate, and its low rank is LoRA, which chooses its directions while theory's are random.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau, rankdata

from cells import read
from holdfast.cli.theory import Draws, theory_tables

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "forgetting"))

from score import FULL, enough, learned_enough, point, tested  # noqa: E402

ARM_OF = {
    "replay": "replay 25 %",
    "kl_anchor": "holdfast default",
    "l2_sp": "L2-SP",
    "ewc": "EWC",
    "low_rank": "rsLoRA",
    "budget": FULL,  # the learning rate alone
    "rewind": "weight average",
}
DRAWS = Draws(count=50, dim=16, overlap=0.5, fisher_noise=1.0, seed=0)
RESAMPLED = 2000


def main(
    cells: Annotated[Path, typer.Option(help="What benchmarks/forgetting wrote.")] = HERE
    / "results"
    / "forgetting.jsonl.gz",
    lesson: str = "verbs",
) -> None:
    """Print both orders and how far they agree."""
    done = [c for c in read(cells) if c["lesson"] == lesson and "failed" not in c]
    learnt = enough(done)
    table = theory_tables(learnt, DRAWS)["draws"]["levers"]
    predicted = {row["lever"]: row for row in table}
    rises: dict[str, list[float]] = {}
    for lever, arm in ARM_OF.items():
        learned = learned_enough(done, arm)
        rises[lever] = [point(c)["mean rise"] for c in tested(done, arm)] if learned else []
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
        print(f"learned too little at every rate, or not run: {', '.join(missing)}")


if __name__ == "__main__":
    typer.run(main)
