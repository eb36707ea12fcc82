"""Every method at what it is for: what is learned against what is forgotten, all else equal.

    python benchmarks/forgetting run --minutes 60            # fills the cells that are missing
    python benchmarks/forgetting run --lesson verbs --arm default --arm full
    python benchmarks/forgetting table                       # docs/benchmark.md and its picture

Same base, rows and steps; the lesson's tokens in a step are the same for every arm. Every arm gets
five learning rates on the validation seed; the one with the most learned less forgotten
(`score.utility`) is then run on the test seeds, once. Cells are JSON lines, written when done, and
a cell that is there is not run again: a run may be stopped and continued at any time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from arms import ARMS, RATES
from score import utility

HERE = Path(__file__).resolve().parent
CELLS = HERE.parent / "results" / "forgetting.jsonl"
LESSONS = ("verbs", "facts", "extraction", "verbs+extraction")
VALIDATION = 100
"""The seed on which rates are chosen."""
SEEDS = (1, 2, 3)
STEPS = 300

app = typer.Typer(add_completion=False)
Cell = dict[str, Any]


@app.command()
def run(
    lesson: Annotated[list[str] | None, typer.Option(help="Only these lessons.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only arms that contain this.")] = None,
    minutes: Annotated[float, typer.Option(help="Start no cell after so long.")] = 1e9,
    steps: int = STEPS,
    cells: Path = CELLS,
    threads: int = 1,
) -> None:
    """Fill the cells that are missing, the cheapest questions first."""
    stop = time.monotonic() + 60 * minutes
    done = read(cells)
    for name in lesson or LESSONS:
        for one in ARMS:
            if arm and not any(part in one for part in arm):
                continue
            while (cell := next(missing(name, one, done), None)) is not None:
                if time.monotonic() > stop:
                    return
                line = cell | {"steps": steps} | measured(cell | {"steps": steps}, threads)
                done.append(line)
                with cells.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                told = line.get("failed") or line["target"] | {"seconds": line["seconds"]}
                print(name, one, f"x{cell['rate']:g}", cell["seed"], told, flush=True)


@app.command()
def table(cells: Path = CELLS, out: Path = HERE.parents[1] / "docs" / "benchmark.md") -> None:
    """Write the page and its pictures from the cells that are there."""
    from draw import write_page

    write_page(read(cells), out)


def read(cells: Path) -> list[Cell]:
    """The cells that are done."""
    if not cells.is_file():
        return []
    return [json.loads(line) for line in cells.read_text(encoding="utf-8").splitlines()]


def missing(lesson: str, arm: str, done: list[Cell]) -> Iterator[Cell]:
    """Cells of an arm in the order they must run: the rates, then the seeds at the best of them."""
    mine = [c for c in done if (c["lesson"], c["arm"]) == (lesson, arm)]
    there = {(c["seed"], c["rate"]) for c in mine}
    for rate in RATES:
        if (VALIDATION, rate) not in there:
            yield {"lesson": lesson, "arm": arm, "seed": VALIDATION, "rate": rate}
    best = chosen(mine)
    if best is not None:
        for seed in SEEDS:
            if (seed, best) not in there:
                yield {"lesson": lesson, "arm": arm, "seed": seed, "rate": best}


def chosen(mine: list[Cell]) -> float | None:
    """The rate of most learned less forgotten on the validation seed; None where none ran."""
    tried = [c for c in mine if c["seed"] == VALIDATION and "failed" not in c]
    return max(tried, key=utility)["rate"] if tried else None


def measured(cell: Cell, threads: int) -> Cell:
    """The cell, run in a process of its own; what it said last where it failed."""
    words = [sys.executable, str(HERE / "cell.py"), json.dumps(cell), str(threads)]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    if found.returncode:
        return {"failed": (found.stderr.strip().splitlines() or ["no word of why"])[-1][:300]}
    line: Cell = json.loads(found.stdout.splitlines()[-1])
    return line


if __name__ == "__main__":
    app()
