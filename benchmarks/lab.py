"""What each arm learns and forgets on the lab: one table, every arm from the same base and rows.

python benchmarks/lab.py                          # the arms below
python benchmarks/lab.py --arm "x: train.steps=100 levers.kl_anchor.weight=3"
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from holdfast.demo import HOLDFAST, LENGTH, NAIVE, lab_recipe
from holdfast.lab import write_files
from holdfast.run import train

LORA = [*LENGTH, "levers.adapter.method=lora"]

ARMS = {
    "naive full": NAIVE,
    "full, a tenth of the rate": [*NAIVE, "levers.budget.learning_rate=0.00003"],
    "full, KL on the lesson": [*HOLDFAST, "levers.kl_anchor.on=task"],
    "holdfast default": HOLDFAST,
    "LoRA MLP, no anchor": [*LORA, "levers.kl_anchor=none", "train.batch_tokens=256"],
    "holdfast, LoRA MLP": LORA,
    "holdfast, LoRA all-linear": [*LORA, "levers.adapter.target=all-linear"],
}


def main(
    arm: Annotated[list[str] | None, typer.Option(help="'NAME: key=value ...'")] = None,
    seed: int = 0,
    counterexamples: int = 0,
    model: str | None = None,
    threads: int = 2,
    probes: int = 10_000,
) -> None:
    """Train every arm on the lab's lesson and print what was learned and what is left."""
    torch.set_num_threads(threads)
    arms = ARMS if not arm else {a.partition(":")[0]: a.partition(":")[2].split() for a in arm}
    rows: list[tuple[str, dict[str, str]]] = []
    with TemporaryDirectory() as scratch:
        files = write_files(Path(scratch) / "data", seed=seed, counterexamples=counterexamples)
        lines = files["probes"].read_text().splitlines()
        files["probes"].write_text("\n".join(lines[:: max(1, len(lines) // probes)]) + "\n")
        for number, (name, words) in enumerate(arms.items()):
            recipe = lab_recipe(files, Path(scratch) / str(number), words, seed=seed, model=model)
            result = train(recipe)
            assert result.verdict is not None
            cells = {"seconds": f"{result.seconds:.0f}", "verdict": str(result.verdict.verdict)}
            for row in result.verdict.rows:
                if row.unit == "accuracy":
                    cells[row.name] = f"{row.after:.2f}±{row.after_stderr:.2f}"
                else:
                    cells[f"{row.meter}/{row.name}"] = f"{row.after - row.before:+.3f}"
                rows_before = {
                    (r.name if r.unit == "accuracy" else f"{r.meter}/{r.name}"): (
                        f"{r.before:.2f}±{r.before_stderr:.2f}"
                    )
                    for r in result.verdict.rows
                }
            if not rows:
                rows.append(("base", rows_before))
            rows.append((name, cells))
            print(json.dumps({name: cells}), flush=True)
    table = Table(title=f"the lab's lesson, seed {seed} (losses: rise over the base, nats)")
    table.add_column("")
    for name, _ in rows:
        table.add_column(name)
    for key in dict.fromkeys(key for _, cells in rows for key in cells):
        table.add_row(key, *(cells.get(key, "") for _, cells in rows))
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
