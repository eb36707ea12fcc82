"""The forgetting budget's contract on the lab: is it kept, what does it cost, what is given away?

    python benchmarks/budget.py --jobs 2                # every cell that is missing
    python benchmarks/budget.py --jobs 2 --minutes 30   # begin none after that
    python benchmarks/budget.py --table                 # what is there so far

For each lesson and seed: a run for each budget; on the first seeds also a plain run (the default
without a budget) and the best fixed setting. That one comes from `benchmarks/forgetting scan`, 16
trials: eight settings of the anchor (weight, share of the tokens) at two rates on a seed of its
own; of those whose worst rise was within the budget, the one that learned most. On the seeds here
it counts whether it is within the budget or not. All see the same rows and as many of the lesson's
tokens a step, as in docs/benchmark.md (a setting with more anchor rows reads more in all); plain
and budget train at four times the automatic rate, which is what runs of 150 steps want on the lab.

The three lines of the contract:
  kept      no guardrail's estimated rise on the sealed split is over its budget, in >= 95 % of runs
  target    at least 97 % of the best fixed setting's; again where that keeps the budget here, too
  cost      at most 1.3 times the CPU seconds of the plain run, which reads the gate's texts, too
Intervals: Clopper-Pearson; bootstrap over (lesson, seed). Each cell is a line in --cells, written
when it is done; one that is there is not run again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from scipy.stats import beta

from holdfast.demo import DOCUMENTS, LENGTH, lab_recipe
from holdfast.lab import base_path, write_files
from holdfast.run import train

sys.path.append(str(Path(__file__).resolve().parent / "forgetting"))

from arms import ARMS, SCAN
from cell import peak_rate
from score import point

from cells import Cell, fill, read

LESSONS = ["verbs", "facts", "extraction"]
SEEDS = {
    "budget 3%": list(range(14)),
    "budget 5%": [0, 1],
    "plain": [0, 1],
    "fixed": [0, 1, 2],
}
FRESH = 7
"""The first seed that was run after the last change of the controller's rule, for judging it only;
the seeds before it were looked at while the rule was made."""
STEPS = 150
RATE = 4.0
"""Times the automatic learning rate."""
RESULTS = Path(__file__).parent / "results"
CELLS = RESULTS / "budget.jsonl"
WORST_LAST = ["PASS", "INCONCLUSIVE", "FAIL"]


def cells() -> Iterator[Cell]:
    """What is to be run; all that a line of the contract needs of one seed before the next seed."""
    for seed, lesson in product(SEEDS["budget 3%"], LESSONS):
        for arm, seeds in SEEDS.items():
            if seed in seeds and arm != "fixed":
                yield {"lesson": lesson, "seed": seed, "arm": arm}
        best = [best_fixed(lesson, arm) for arm in SEEDS if arm.startswith("budget")]
        for arm in dict.fromkeys(best):
            if arm and seed in SEEDS["fixed"]:
                yield {"lesson": lesson, "seed": seed, "arm": arm}


@cache
def best_fixed(lesson: str, arm: str) -> str:
    """Of the scan, the setting that learned most within the budget: `RATEx NAME`; empty: none."""
    found = [
        (point(cell)["gain"], f"{cell['rate']:g}x {cell['arm']}")
        for cell in read(RESULTS / "anchor-scan.jsonl.gz")
        if cell["lesson"] == lesson and cell["arm"] in SCAN and "failed" not in cell
        if point(cell)["worst rise"] <= amount(arm)
    ]
    return max(found)[1] if found else ""


def settings(arm: str) -> list[str]:
    """The recipe's own settings in an arm."""
    rate, name = RATE, ""
    if arm[0].isdigit():
        rate, name = float(arm.partition("x")[0]), arm.partition(" ")[2]
    how = SCAN[name] if name else ARMS["holdfast default"]
    budget = [f"budget.forgetting={arm.split()[1]}"] if arm.startswith("budget") else []
    return [
        f"train.steps={STEPS}",
        f"train.batch_tokens={how.batch_tokens()}",
        "train.save_every=100000",
        f"levers.budget.learning_rate={peak_rate(how, rate, base_path()):.3g}",
        *how.words,
        *budget,
    ]


def learn(cell: Cell) -> list[Cell]:
    """Train a cell, and read what the gate read."""
    with TemporaryDirectory() as scratch:
        files = write_files(
            Path(scratch) / "data",
            lesson=cell["lesson"],
            seed=cell["seed"],
            documents_a_domain=DOCUMENTS,
        )
        items = [json.loads(line) for line in files["probes"].read_text().splitlines()]
        asked = [json.dumps(item) for item in items if "target" in item.get("tags", ())]
        files["probes"].write_text("\n".join(asked) + "\n")
        words = [*LENGTH, *settings(cell["arm"])]
        recipe = lab_recipe(files, Path(scratch) / "run", words, seed=cell["seed"])
        margins = {"canary": cell["arm"].split()[1] if cell["arm"].startswith("budget") else "1%"}
        gate = recipe.gate.model_copy(update={"margins": margins})
        started = time.process_time()
        result = train(recipe.model_copy(update={"gate": gate}))
        seconds = time.process_time() - started
    assert result.verdict is not None
    rows = result.verdict.rows
    targets = [row.after for row in rows if row.kind == "target" and row.unit == "accuracy"]
    guards = [row for row in rows if row.kind == "canary"]
    found = {
        "target": sum(targets) / len(targets),
        "lesson_loss": next(row.after for row in rows if row.meter == "lesson"),
        "worst_rise": max(row.difference / row.before for row in guards),
        "guards": str(max((row.verdict for row in guards), key=WORST_LAST.index)),
        "cpu_seconds": round(seconds, 1),
        "end": result.summary.get("budget", {}).get("end"),
        "stopped": result.summary["stopped"],
    }
    return [found]


def amount(arm: str) -> float:
    return float(arm.split()[1].rstrip("%")) / 100


def table(done: Sequence[Cell], wanted: int) -> None:
    """The cells, and the contract's three lines."""
    found = {(cell["lesson"], cell["seed"], cell["arm"]): cell for cell in done}
    print(f"{len(done)} of {wanted} cells; {STEPS} steps")
    print(f"{'lesson':10} {'seed':>4} {'arm':30} {'target':>7} {'loss':>7} {'worst rise':>10} "
          f"{'guards':>12} {'CPU s':>6}")  # fmt: skip
    for cell in sorted(done, key=lambda c: (c["lesson"], c["seed"], c["arm"])):
        print(f"{cell['lesson']:10} {cell['seed']:4} {cell['arm']:30} {cell['target']:7.3f} "
              f"{cell['lesson_loss']:7.3f} {cell['worst_rise']:10.2%} {cell['guards']:>12} "
              f"{cell['cpu_seconds']:6.0f}  {cell['end'] or ''}")  # fmt: skip
    ours = [cell for cell in done if cell["arm"].startswith("budget")]
    kept("kept", ours)
    kept("kept, seeds never looked at before", [cell for cell in ours if cell["seed"] >= FRESH])
    ratios: dict[tuple[str, int], list[float]] = {}
    fair: dict[tuple[str, int], list[float]] = {}
    for cell in ours:
        best = found.get((cell["lesson"], cell["seed"], best_fixed(cell["lesson"], cell["arm"])))
        if best and best["target"]:
            key, ratio = (cell["lesson"], cell["seed"]), cell["target"] / best["target"]
            ratios.setdefault(key, []).append(ratio)
            if best["worst_rise"] <= amount(cell["arm"]):
                fair.setdefault(key, []).append(ratio)
    line("target", "of the best fixed setting's", ratios, 0.97, at_least=True)
    line("target", "of its where it kept the budget itself", fair, 0.97, at_least=True)
    costs: dict[tuple[str, int], list[float]] = {}
    for cell in ours:
        if plain := found.get((cell["lesson"], cell["seed"], "plain")):
            key = (cell["lesson"], cell["seed"])
            costs.setdefault(key, []).append(cell["cpu_seconds"] / plain["cpu_seconds"])
    line("cost", "of the same run's without a budget, CPU seconds", costs, 1.3, at_least=False)


def kept(name: str, cells: Sequence[Cell]) -> None:
    """In how many runs the budget was kept, with an exact interval."""
    if not cells:
        return
    k, n = sum(cell["worst_rise"] <= amount(cell["arm"]) for cell in cells), len(cells)
    passed = sum(cell["guards"] == "PASS" for cell in cells)
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    print(f"{name}: {k} of {n} runs ({k / n:.0%} [{low:.0%}, {high:.0%}]), aim 95 %: "
          f"{said(k / n >= 0.95)}; {passed} of {n} are shown to be (PASS)")  # fmt: skip


def line(
    name: str, of: str, ratios: dict[tuple[str, int], list[float]], aim: float, *, at_least: bool
) -> None:
    """Mean ratio with a bootstrap interval over (lesson, seed), and whether the aim is met."""
    if not ratios:
        print(f"{name}: no pair of runs to compare yet")
        return
    groups = list(ratios.values())
    mean = float(np.mean([ratio for group in groups for ratio in group]))
    random = np.random.default_rng(0)
    drawn = [
        np.mean([r for i in random.integers(0, len(groups), len(groups)) for r in groups[i]])
        for _ in range(2000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    met = mean >= aim if at_least else mean <= aim
    few = "" if len(groups) > 2 else f"; {len(groups)} group(s): the interval says nothing"
    print(f"{name}: {mean:.2f} [{low:.2f}, {high:.2f}] {of} ({sum(map(len, groups))} pairs), "
          f"aim {'at least' if at_least else 'at most'} {aim}: {said(met)}{few}")  # fmt: skip


def said(met: bool) -> str:
    return "met" if met else "MISSED"


def main(
    cells_file: Annotated[Path, typer.Option("--cells", help="JSON lines, one a cell.")] = CELLS,
    jobs: Annotated[int, typer.Option(help="Cells at once, a CPU thread each.")] = 1,
    minutes: Annotated[float, typer.Option(help="Begin no cell after that.")] = 1e9,
    arm: Annotated[str, typer.Option(help="Only arms that begin so.")] = "",
    show: Annotated[bool, typer.Option("--table", help="Run nothing.")] = False,
) -> None:
    """Run what is missing and print the contract."""

    def left(done: list[Cell]) -> Iterator[Cell]:
        there = {(one["lesson"], one["seed"], one["arm"]) for one in done}
        for cell in cells():
            if cell["arm"].startswith(arm) and tuple(cell.values()) not in there:
                yield cell

    if not show:
        fill(cells_file, left, learn, str, jobs=jobs, minutes=minutes)
    done = [one for one in read(cells_file) if "failed" not in one]
    table(done, len(list(cells())))


if __name__ == "__main__":
    typer.run(main)
