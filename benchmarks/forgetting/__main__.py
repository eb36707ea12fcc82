"""Every method at what it is for: what is learned against what is forgotten, all else equal.

    python benchmarks/forgetting run --jobs 2 --minutes 60   # fills the cells that are missing
    python benchmarks/forgetting run --lesson verbs --arm default --arm full
    python benchmarks/forgetting cost                        # seconds and memory, one at a time
    python benchmarks/forgetting table                       # docs/benchmark.md and its pictures
    python benchmarks/forgetting scan                        # weight and share of the anchor
    python benchmarks/forgetting stages                      # share of a second stage for the first
    python benchmarks/forgetting sizes runs/bases            # two smaller bases beside the lab's

Same base, rows and steps; the lesson's tokens in a step are the same for every arm. Every arm gets
five learning rates on the validation seed, and up to two hotter ones while the hottest learns most
and not enough; the one that forgets least of those that learn 90 % of
the best that full fine-tuning learned (`score.chosen`) is then run on the test seeds, once. Cells
are JSON lines, written when done, and a cell that is there is not run again: a run may be stopped
and continued at any time. What runs beside other cells says nothing of speed; `cost` therefore
trains each arm alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from arms import ARMS, HOTTER, RATES, SCAN, SCAN_RATES, STAGES, VALIDATION
from cell import cost_of, learn
from score import FULL, by_size, chosen, learned_enough, most_learned, point

from holdfast.lab.pretrain import Shape, pretrain

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for what the benchmarks share

from cells import Cell, fill, read  # noqa: E402

RESULTS = HERE.parent / "results"
CELLS, COSTS = RESULTS / "forgetting.jsonl.gz", RESULTS / "forgetting-cost.jsonl"
BY_SIZE = RESULTS / "base-size.jsonl.gz"
LESSONS = ("verbs", "facts", "extraction", "verbs+extraction")
SEEDS = (1, 2, 3)
STEPS = 150
SIZES = {
    "1.0M": Shape(hidden=128, heads=4, key_value_heads=2, intermediate=352),
    "2.1M": Shape(hidden=192, heads=6, key_value_heads=3, intermediate=528),
}
"""Bases beside the lab's, as many heads of the same width to a width, as deep."""
LAB = "3.5M"
PRETRAINED = 1600
"""Steps of the lab's own pretraining."""

app = typer.Typer(add_completion=False)


@app.command()
def run(
    lesson: Annotated[list[str] | None, typer.Option(help="Only these lessons.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only arms that contain this.")] = None,
    minutes: Annotated[float, typer.Option(help="Start no cell after so long.")] = 1e9,
    jobs: Annotated[int, typer.Option(help="Cells at once, a CPU thread each.")] = 1,
    steps: int = STEPS,
    cells: Path = CELLS,
) -> None:
    """Fill the cells that are missing."""

    def left(done: list[Cell]) -> Iterator[Cell]:
        for name in lesson or LESSONS:
            for one in ARMS:
                fits = "+" in name or not ARMS[one].sequence
                if fits and (not arm or any(part in one for part in arm)):
                    for cell in missing(name, one, done):
                        yield cell | {"steps": steps}

    fill(cells, left, learn, lambda line: str(line["target"]), jobs=jobs, minutes=minutes)


@app.command()
def cost(
    arm: Annotated[list[str] | None, typer.Option(help="Only arms that contain this.")] = None,
    times: Annotated[int, typer.Option(help="Measurements of each; the median counts.")] = 1,
    steps: int = STEPS // 2,
    costs: Path = COSTS,
) -> None:
    """Train each arm on new facts, alone, for its seconds and its memory."""

    def left(done: list[Cell]) -> Iterator[Cell]:
        there = Counter(line["arm"] for line in done)
        for one in ARMS:
            if there[one] < times and (not arm or any(part in one for part in arm)):
                yield {"arm": one, "lesson": "facts", "seed": 1, "rate": 1.0, "steps": steps}

    fill(costs, left, cost_of, str, fresh=True)


@app.command()
def table(
    cells: Path = CELLS, costs: Path = COSTS, out: Path = HERE.parents[1] / "docs" / "benchmark.md"
) -> None:
    """Write the page and its pictures from the cells that are there."""
    from draw import write_page

    write_page(read(cells), read(costs), read(BY_SIZE), out)


@app.command()
def scan(
    minutes: Annotated[float, typer.Option(help="Start no cell after so long.")] = 1e9,
    jobs: Annotated[int, typer.Option(help="Cells at once, a CPU thread each.")] = 1,
    steps: int = STEPS,
    cells: Path = RESULTS / "anchor-scan.jsonl.gz",
) -> None:
    """Weight and share of the anchor at two rates on the tuning seed, 16 trials; a line a cell."""

    def left(done: list[Cell]) -> Iterator[Cell]:
        there = {(c["lesson"], c["arm"], c["rate"]) for c in done}
        for rate, lesson, arm in product(SCAN_RATES, LESSONS[:3], (FULL, *SCAN)):
            if (lesson, arm, rate) not in there:
                named = {"lesson": lesson, "arm": arm, "seed": VALIDATION}
                yield named | {"rate": rate, "steps": steps}

    done = fill(cells, left, learn, lambda line: str(line["target"]), jobs=jobs, minutes=minutes)
    for lesson, arm, rate in product(LESSONS[:3], (FULL, *SCAN), SCAN_RATES):
        for cell in done:
            named = (cell["lesson"], cell["arm"], cell["rate"])
            if named == (lesson, arm, rate) and "failed" not in cell:
                found = point(cell)
                print(
                    f"{lesson:10} {arm:28} {rate:g}x  gain {found['gain']:6.1%}  "
                    f"worst rise {found['worst rise']:8.1%}  mean {found['mean rise']:8.1%}  "
                    f"worst fall {found['worst fall']:6.1%}  {cell['device']}"
                )


@app.command()
def stages(
    jobs: Annotated[int, typer.Option(help="Cells at once, a CPU thread each.")] = 1,
    rate: float = 4.0,
    steps: int = STEPS,
    cells: Path = CELLS,
) -> None:
    """How much of a second stage's tokens holds what the first one taught; a line a share.

    On the tuning seed, in the cells of `run`, where the default's own stand.
    """
    lesson = LESSONS[-1]
    arms = (*STAGES, "holdfast default")
    wanted = [
        {"lesson": lesson, "arm": arm, "seed": VALIDATION, "rate": rate, "steps": steps}
        for arm in arms
    ]

    def left(done: list[Cell]) -> Iterator[Cell]:
        there = {(c["lesson"], c["arm"], c["seed"], c["rate"]) for c in done}
        yield from (c for c in wanted if (lesson, c["arm"], VALIDATION, rate) not in there)

    for cell in fill(cells, left, learn, lambda line: str(line["target"]), jobs=jobs):
        if {key: cell.get(key) for key in wanted[0]} in wanted and "failed" not in cell:
            found = point(cell)
            share = (ARMS | STAGES)[cell["arm"]].earlier
            print(
                f"{share:4.0%} of the tokens: first stage {cell['after_first_stage']:.1%}, after "
                f"the second {cell['target']['verbs']:.1%} ({found['kept']:.0%} kept); second "
                f"{cell['target']['extraction']:.1%}; worst rise {found['worst rise']:.1%}"
            )


@app.command()
def sizes(
    bases: Annotated[Path, typer.Argument(help="Where the other bases are kept, made if missing.")],
    jobs: Annotated[int, typer.Option(help="Cells at once, a CPU thread each.")] = 1,
    lesson: str = LESSONS[0],
    rate: float = 4.0,
    steps: int = STEPS,
    cells: Path = BY_SIZE,
) -> None:
    """What is forgotten against the size of the base: plain and default, three seeds, a line each.

    The bases are pretrained as the lab's is, on the same tokens. The rate is so many times the
    automatic one, which knows the width of a model.
    """
    for name, shape in SIZES.items():
        if not (bases / name).is_dir():
            bases.mkdir(parents=True, exist_ok=True)
            pretrain(bases / name, steps=PRETRAINED, shape=shape)
    arms = (FULL, "holdfast default")
    wanted = [
        {"size": size, "lesson": lesson, "arm": arm, "seed": seed, "rate": rate, "steps": steps}
        for size, seed, arm in product((*SIZES, LAB), SEEDS, arms)
    ]

    def left(done: list[Cell]) -> Iterator[Cell]:
        there = [{key: line[key] for key in wanted[0]} for line in done]
        for cell in wanted:
            if cell not in there:
                yield cell | {"base": "" if cell["size"] == LAB else str(bases / cell["size"])}

    done = fill(cells, left, learn, lambda line: str(line["target"]), jobs=jobs)
    for one in by_size([cell for cell in done if cell["lesson"] == lesson]):
        print(
            f"{one['size']} (knew {one['knew']:.0%}) {one['arm']:17} gain {one['gain']:6.1%}  "
            f"worst rise {one['worst rise']:7.1%}  mean {one['mean rise']:7.1%}  worst fall "
            f"{one['worst fall']:6.1%}"
        )


def missing(lesson: str, arm: str, done: list[Cell]) -> Iterator[Cell]:
    """Cells of an arm that can run now: its rates; once they are there, the seeds at one of them.

    Which, and whether it needs hotter ones, is known when full fine-tuning has its rates, too. Then
    the seeds wait, so that no rate is chosen which a hotter one would beat.
    """
    here = [c for c in done if c["lesson"] == lesson]
    there = {(c["seed"], c["rate"]) for c in here if c["arm"] == arm}
    tried = {rate for seed, rate in there if seed == VALIDATION}
    wanted = [(VALIDATION, rate) for rate in RATES if rate not in tried]
    full = {c["rate"] for c in here if (c["arm"], c["seed"]) == (FULL, VALIDATION)}
    if not wanted and full.issuperset(RATES) and (best := chosen(here, arm)):
        hotter = [rate for rate in HOTTER if rate not in tried]
        climbs = most_learned(here, arm)["rate"] == max(tried) and not ARMS[arm].cool
        if hotter and climbs and not learned_enough(here, arm):
            wanted = [(VALIDATION, hotter[0])]
        else:
            wanted = [(seed, best["rate"]) for seed in SEEDS if (seed, best["rate"]) not in there]
    for seed, rate in wanted:
        yield {"lesson": lesson, "arm": arm, "seed": seed, "rate": rate}


if __name__ == "__main__":
    app()
