"""The forgetting budget's contract on the lab: is it kept, what does it cost, what is given away?

    python benchmarks/budget.py --jobs 2                # every cell that is missing
    python benchmarks/budget.py --jobs 2 --minutes 30   # begin none after that
    python benchmarks/budget.py --table                 # what is there so far

For each lesson and seed: a plain run (the default without a budget), and a run for each budget. On
the first seed of each lesson a search, too: 16 fixed settings (anchor weight, its share of the
tokens, learning rate; the same 16 everywhere). For each budget its best setting, the one that
learned most of those whose rises on the sealed split were within it, is then run on the other
seeds, and counts there whether it is within the budget or not. All from the same base, rows, steps
and tokens a step; plain and budget at four times the automatic rate, which is what runs of 150
steps want on the lab (docs/benchmark.md) and lies in the middle of what the search draws from.

The three lines of the contract:
  kept      no guardrail's estimated rise on the sealed split is over its budget, in >= 95 % of runs
  target    at least 97 % of the best fixed setting's, over the seeds that it was not chosen on
  cost      at most 1.3 times the CPU seconds of the plain run
Intervals: Clopper-Pearson; bootstrap over (lesson, seed). Each cell is a line in --cells, written
when it is done; one that is there is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from scipy.stats import beta
from transformers import AutoConfig

from cells import Cell, fill, read
from holdfast.demo import DOCUMENTS, LENGTH, lab_recipe
from holdfast.lab import base_path, write_files
from holdfast.levers.budget import Budget
from holdfast.run import train

LESSONS = ["verbs", "facts", "extraction"]
SEEDS = [0, 1, 2, 3, 4]
BUDGETS = ["3%", "5%"]
TRIALS = 16
STEPS, TOKENS = 150, 512
RATE = 4.0
"""Times the automatic learning rate."""
RESULTS = Path(__file__).parent / "results" / "budget.jsonl"
WORST_LAST = ["PASS", "INCONCLUSIVE", "FAIL"]


def fixed_settings() -> list[list[str]]:
    """Sixteen draws: weight and rate evenly on a log scale, share evenly; in strata of sixteen."""
    random = np.random.default_rng(7)
    unit_TA = (np.stack([random.permutation(TRIALS) for _ in range(3)], 1) + 0.5) / TRIALS
    return [
        [
            f"levers.kl_anchor.weight={0.5 * 40 ** float(weight):.3g}",
            f"levers.kl_anchor.self_generated.fraction={0.3 + 0.4 * float(share):.2f}",
            f"levers.budget.learning_rate={rate_of(RATE / 2 * 4 ** float(rate)):.3g}",
        ]
        for weight, share, rate in unit_TA
    ]


def rate_of(times: float) -> float:
    """So many times the automatic learning rate of full fine-tuning."""
    return times * Budget().peak(AutoConfig.from_pretrained(base_path()), adapter=False)


def cells(done: Sequence[Cell]) -> Iterator[Cell]:
    """What is to be run, given what has been."""
    for seed, lesson in product(SEEDS, LESSONS):
        for arm in ("plain", *(f"budget {budget}" for budget in BUDGETS)):
            yield {"lesson": lesson, "seed": seed, "arm": arm}
    for lesson, trial in product(LESSONS, range(TRIALS)):
        yield {"lesson": lesson, "seed": SEEDS[0], "arm": f"fixed {trial}"}
    for seed, lesson, budget in product(SEEDS[1:], LESSONS, BUDGETS):
        if best := best_fixed(done, lesson, budget):
            yield {"lesson": lesson, "seed": seed, "arm": best["arm"]}


def best_fixed(done: Sequence[Cell], lesson: str, budget: str) -> Cell | None:
    """Of a whole search, the setting that learned most within the budget, if one learned at all."""
    tried = [
        cell
        for cell in done
        if (cell["lesson"], cell["seed"]) == (lesson, SEEDS[0]) and cell["arm"].startswith("fixed")
    ]
    within = [
        cell for cell in tried if "failed" not in cell and cell["worst_rise"] <= amount(budget)
    ]
    best = max(within, key=lambda cell: float(cell["target"]), default=None)
    return best if best and best["target"] and len(tried) == TRIALS else None


def learn(cell: Cell) -> list[Cell]:
    """Train a cell, and read what the gate read."""
    kind, _, which = cell["arm"].partition(" ")
    words = {
        "plain": [],
        "budget": [f"budget.forgetting={which}"],
        "fixed": fixed_settings()[int(which)] if kind == "fixed" else [],
    }[kind]
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
        sizes = [
            f"train.steps={STEPS}",
            f"train.batch_tokens={TOKENS}",
            "train.save_every=100000",
            f"levers.budget.learning_rate={rate_of(RATE):.3g}",
        ]
        words = [*LENGTH, *sizes, *words]
        recipe = lab_recipe(files, Path(scratch) / "run", words, seed=cell["seed"])
        margins = {"canary": which if kind == "budget" else "1%"}
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


def amount(budget: str) -> float:
    return float(budget.rstrip("%")) / 100


def table(done: Sequence[Cell], wanted: int) -> None:
    """The cells, and the contract's three lines."""
    found = {(cell["lesson"], cell["seed"], cell["arm"]): cell for cell in done}
    print(f"{len(done)} of {wanted} cells; {STEPS} steps of {TOKENS} tokens")
    print(f"{'lesson':8} {'seed':>4} {'arm':12} {'target':>7} {'loss':>7} {'worst rise':>10} "
          f"{'guards':>12} {'CPU s':>6}")  # fmt: skip
    for cell in done:
        if not cell["arm"].startswith("fixed"):
            print(f"{cell['lesson']:8} {cell['seed']:4} {cell['arm']:12} {cell['target']:7.3f} "
                  f"{cell['lesson_loss']:7.3f} {cell['worst_rise']:10.2%} {cell['guards']:>12} "
                  f"{cell['cpu_seconds']:6.0f}  {cell['end'] or ''}")  # fmt: skip
    ours = [cell for cell in done if cell["arm"].startswith("budget")]
    kept = [cell["worst_rise"] <= amount(cell["arm"].split()[1]) for cell in ours]
    passed = sum(cell["guards"] == "PASS" for cell in ours)
    if kept:
        k, n = sum(kept), len(kept)
        low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
        high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
        print(f"kept: {k} of {n} runs ({k / n:.0%} [{low:.0%}, {high:.0%}]), aim 95 %: "
              f"{said(k / n >= 0.95)}; {passed} of {n} are shown to be (PASS)")  # fmt: skip
    ratios: dict[tuple[str, int], list[float]] = {}
    for cell in ours:
        best = best_fixed(done, cell["lesson"], cell["arm"].split()[1])
        if cell["seed"] == SEEDS[0]:
            named = " ".join(fixed_settings()[int(best["arm"].split()[1])]) if best else "none yet"
            learned = f" learned {best['target']:.3f} at {best['worst_rise']:.2%}" if best else ""
            print(f"{cell['lesson']}, {cell['arm']}: best fixed setting {named}{learned}")
        elif best and (there := found.get((cell["lesson"], cell["seed"], best["arm"]))):
            key = (cell["lesson"], cell["seed"])
            ratios.setdefault(key, []).append(cell["target"] / max(there["target"], 0.01))
    line("target", "of the best fixed setting's", ratios, 0.97, at_least=True)
    costs: dict[tuple[str, int], list[float]] = {}
    for cell in ours:
        if plain := found.get((cell["lesson"], cell["seed"], "plain")):
            key = (cell["lesson"], cell["seed"])
            costs.setdefault(key, []).append(cell["cpu_seconds"] / plain["cpu_seconds"])
    line("cost", "of the plain run's CPU seconds", costs, 1.3, at_least=False)


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
    cells_file: Annotated[Path, typer.Option("--cells", help="JSON lines, one a cell.")] = RESULTS,
    jobs: Annotated[int, typer.Option(help="Cells at once, a CPU thread each.")] = 1,
    minutes: Annotated[float, typer.Option(help="Begin no cell after that.")] = 1e9,
    arm: Annotated[str, typer.Option(help="Only arms that begin so.")] = "",
    show: Annotated[bool, typer.Option("--table", help="Run nothing.")] = False,
) -> None:
    """Run what is missing and print the contract."""

    def left(done: list[Cell]) -> Iterator[Cell]:
        there = {(one["lesson"], one["seed"], one["arm"]) for one in done}
        for cell in cells(done):
            if cell["arm"].startswith(arm) and tuple(cell.values()) not in there:
                yield cell

    if not show:
        fill(cells_file, left, learn, str, jobs=jobs, minutes=minutes)
    done = [one for one in read(cells_file) if "failed" not in one]
    table(
        done,
        len(LESSONS) * (len(SEEDS) * (1 + len(BUDGETS)) + TRIALS + len(SEEDS[1:]) * len(BUDGETS)),
    )


if __name__ == "__main__":
    typer.run(main)
