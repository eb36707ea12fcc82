"""Each lever alone and the default stack on the lab: what is learned, what is left, what it costs.

    python benchmarks/forgetting run --lesson verbs --jobs 2    # the cells, if some are missing
    python benchmarks/levers.py                                 # this table of them

The levers are arms of `benchmarks/forgetting`, which says how they are run: the same base, rows,
lesson tokens and steps, the learning rate of each tuned on a seed of its own, three seeds that
nothing was chosen on. `equal` says whether an arm learned as much as is asked there (90 % of the
best that plain fine-tuning learned, on the tuning seed): only such arms' forgetting is to be
compared. Time: CPU seconds of a training alone over plain fine-tuning's (`... cost`).

`balance` mixes several lessons, and `check-data` only looks: neither has an arm.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from cells import read

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "forgetting"))

from score import FULL, cost_over_full, learned_enough, point, tested  # noqa: E402

ARMS = {
    "none: plain fine-tuning": FULL,
    "default stack": "holdfast default",
    "default stack, cosine": "holdfast, cosine",
    "budget: a line": "full, linear",
    "kl_anchor on the lesson": "KL on task",
    "forgetting: 3 %": "holdfast, budget 3 %",
    "replay, ntp, 25 %": "replay 25 %",
    "replay, kl, 50 %": "replay 50 %, KL",
    "adapter: LoRA on the MLP": "LoRA, MLP",
    "adapter: LoRA on all linear (trl)": "trl LoRA",
    "adapter: rsLoRA, r 64": "rsLoRA",
    "adapter: DoRA": "DoRA",
    "adapter: OFT": "OFT",
    "adapter: OSF": "OSF",
    "adapter: CorDA": "CorDA",
    "l2_sp": "L2-SP",
    "ewc": "EWC",
    "budget: a tenth of the rate": "full, low rate",
    "budget: cap": "displacement cap",
    "freeze": "freeze",
    "token_gate: eaft": "EAFT",
    "token_gate: stm": "STM",
    "token_gate: flow": "FLOW",
    "token_gate: dft": "DFT",
    "context_frozen": "context frozen",
    "optimizer: decay to base": "decay to base",
    "rewind: half of the way": "weight average",
}
"""The lab's model is so small that the default stack trains all weights: it is `kl_anchor` on rows
that the base writes, and the spike rule."""


def main(
    cells: Path = HERE / "results" / "forgetting.jsonl.gz",
    costs: Path = HERE / "results" / "forgetting-cost.jsonl",
    lesson: str = "verbs",
) -> None:
    """Print the table."""
    done = [c for c in read(cells) if c["lesson"] == lesson and "failed" not in c]
    measured = read(costs)
    table = Table(
        title=f"each lever alone, {lesson}: mean ± standard deviation over the test seeds"
    )
    for column in ("lever", "rate", "seeds", "target", "equal", "mean fall", "worst fall"):
        table.add_column(column)
    for column in ("mean canary", "worst canary", "time"):
        table.add_column(column)
    for lever, arm in ARMS.items():
        mine = tested(done, arm)
        if not mine:
            table.add_row(lever, "", "not run")
            continue
        figures = [point(cell) for cell in mine]
        table.add_row(
            lever,
            f"{mine[0]['rate']:g}x",
            str(len(mine)),
            shown([one["gain"] for one in figures]),
            "yes" if learned_enough(done, arm) else "no",
            *(
                shown([one[key] for one in figures], "+")
                for key in ("mean fall", "worst fall", "mean rise", "worst rise")
            ),
            "" if np.isnan(time := cost_over_full(measured, arm, "seconds")) else f"{time:.2f}",
        )
    Console(width=150).print(table)


def shown(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1%}{spread}"


if __name__ == "__main__":
    typer.run(main)
