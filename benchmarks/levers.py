"""Each lever alone and the default stack on the lab: what is learned, what is left, what it costs.

    python benchmarks/levers.py --cells benchmarks/results/2026-11-22-levers.jsonl
    python benchmarks/levers.py --cells FILE --only ewc --seeds 1      # a part of it
    python benchmarks/levers.py --cells FILE --table                   # what is there so far

Every arm starts from the same base and reads the same lesson rows in as many passes. Its learning
rate is tuned first, on seed 0 and the selection half of the lesson's held-out rows: of three rates
the one with the lowest loss there. It then runs with that rate on seeds of which none was tuned on,
and is read on the sealed half, the probes and the canary. Each cell is a line in `--cells`, written
when it is done; one that is there is not run again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from holdfast.demo import LENGTH, NAIVE, lab_recipe
from holdfast.lab import write_files
from holdfast.recipe import load_recipe
from holdfast.run import train

FULL = [*NAIVE, "levers.kl_anchor=none"]
REPLAY = "levers.replay.sources=[{replay}]"
ARMS: dict[str, list[str]] = {
    "naive": FULL,
    "adapter (MLP)": [*FULL, "levers.adapter.method=lora"],
    "adapter (all-linear)": [
        *FULL,
        "levers.adapter.method=lora",
        "levers.adapter.target=all-linear",
    ],
    "kl_anchor on anchor rows": [*LENGTH, "levers.adapter=none", "levers.budget.spike=0"],
    "kl_anchor on task rows": [
        *LENGTH,
        "levers.adapter=none",
        "levers.kl_anchor.on=task",
        "levers.kl_anchor.weight=1",
        "train.batch_tokens=256",
    ],
    "replay, ntp": [
        *FULL,
        "train.batch_tokens=512",
        REPLAY,
        "levers.replay.fraction=0.5",
        "levers.replay.own_pretraining=true",
    ],
    "budget (cap 0.05)": [*FULL, "levers.budget.cap=0.05"],
    "l2_sp": [*FULL, "levers.l2_sp.weight=0.1"],
    "ewc": [*FULL, "levers.ewc.weight=20"],
    "freeze (embeddings, first 2)": [
        *FULL,
        "levers.freeze.presets=[embeddings]",
        "levers.freeze.first_blocks=2",
    ],
    "context_frozen": [*FULL, "levers.context_frozen.enabled=true"],
    "token_gate eaft": [*FULL, "levers.token_gate.method=eaft"],
    "token_gate dft": [*FULL, "levers.token_gate.method=dft"],
    "token_gate stm": [*FULL, "levers.token_gate.method=stm"],
    "token_gate flow": [*FULL, "levers.token_gate.method=flow"],
    "optimizer (decay to base)": [*FULL, "levers.optimizer.decay_to_base=1.0"],
    "default": [*LENGTH],
}
RATES = (0.3, 1.0, 3.0)
"""Times the automatic rate of the arm's mode."""
TUNED_ON = 0


def main(
    cells: Annotated[Path, typer.Option(help="JSON lines, one a cell; continued if it is there.")],
    only: Annotated[str | None, typer.Option(help="Arms whose name contains this.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds 1 to this.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Steps; empty: the default's.")] = None,
    table: Annotated[bool, typer.Option(help="Print what is there, run nothing.")] = False,
    threads: int = 2,
) -> None:
    """Fill the cells that are missing, then print the table."""
    torch.set_num_threads(threads)
    done = _read(cells)
    if not table:
        for name, words in ARMS.items():
            if only is None or only in name:
                for cell in _missing(name, seeds, done):
                    result = _run(words, cell, steps)
                    done.append(cell | result)
                    with cells.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(done[-1]) + "\n")
                    print(json.dumps(done[-1]), flush=True)
    Console(width=150).print(_table(done))


def _read(cells: Path) -> list[dict[str, Any]]:
    if not cells.is_file():
        return []
    return [json.loads(line) for line in cells.read_text(encoding="utf-8").splitlines()]


def _missing(name: str, seeds: int, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Cells of an arm in the order they must run: tuning, then the seeds at the rate it found."""
    mine = [cell for cell in done if cell["arm"] == name]
    for times in RATES:
        if not any(c["tuning"] and c["rate"] == times for c in mine):
            yield {"arm": name, "tuning": True, "rate": times, "seed": TUNED_ON}
    tuned = [cell for cell in done if cell["arm"] == name and cell["tuning"]]
    best = min(tuned, key=lambda cell: cell["selection"])["rate"]
    for seed in range(1, seeds + 1):
        if not any(not c["tuning"] and c["seed"] == seed for c in mine):
            yield {"arm": name, "tuning": False, "rate": best, "seed": seed}


def _run(words: list[str], cell: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """One training; while tuning only the lesson's selection half is looked at."""
    with TemporaryDirectory() as scratch:
        files = write_files(Path(scratch) / "data", seed=cell["seed"])
        given = [word.format(replay=files["replay"]) for word in words]
        given += [f"train.steps={steps}"] if steps else []
        recipe = lab_recipe(files, Path(scratch) / "run", given, seed=cell["seed"])
        rate = recipe.levers.budget.peak(_config(recipe.model.path), _adapted(recipe))
        given.append(f"levers.budget.learning_rate={rate * cell['rate']}")
        if cell["tuning"]:
            recipe = load_recipe(
                None,
                [*given, "gate.enabled=false"],
                model=recipe.model.path,
                data=str(files["lesson"]),
                out=recipe.out,
                seed=cell["seed"],
            )
        else:
            recipe = lab_recipe(files, Path(scratch) / "run", given, seed=cell["seed"])
        result = train(recipe)
        lines = (result.folder / "readings.jsonl").read_text(encoding="utf-8").splitlines()
        readings = [json.loads(line) for line in lines]
        looked = [r for r in readings if (r["meter"], r["split"]) == ("lesson", "selection")]
        found = {
            "selection": max(looked, key=lambda r: r["step"])["value"],
            "seconds": result.seconds,
            "displacement": result.summary["relative_displacement"],
        }
        if result.verdict is None:
            return found
        rows = result.verdict.rows
        accuracies = [r for r in rows if r.unit == "accuracy"]
        kept = {r.name: r.after - r.before for r in accuracies if r.kind in ("guardrail", "rare")}
        canary = {r.name: r.after / r.before - 1 for r in rows if r.kind == "canary"}
        target = {r.name: r.after for r in accuracies if r.kind == "target"}
        return found | {
            "target": target["irregular_verbs"],
            "capabilities": kept,
            "canary": canary,
            "verdict": str(result.verdict.verdict),
        }


def _config(path: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def _adapted(recipe: Any) -> bool:
    return recipe.levers.adapter.method not in ("none", "auto")


def _table(done: list[dict[str, Any]]) -> Table:
    """A row an arm: mean and standard deviation over its seeds."""
    table = Table(title="each lever alone on the lab: mean ± standard deviation over the seeds")
    for column in ("arm", "rate", "seeds", "target", "mean capability", "worst capability"):
        table.add_column(column)
    for column in ("mean canary", "worst canary", "seconds", "verdicts"):
        table.add_column(column)
    for name in ARMS:
        runs = [cell for cell in done if cell["arm"] == name and not cell["tuning"]]
        if not runs:
            continue
        table.add_row(
            name,
            f"{runs[0]['rate']:g} x",
            str(len(runs)),
            _shown([cell["target"] for cell in runs]),
            _shown([statistics.mean(cell["capabilities"].values()) for cell in runs], "+"),
            _shown([min(cell["capabilities"].values()) for cell in runs], "+"),
            _shown([statistics.mean(cell["canary"].values()) for cell in runs], "+"),
            _shown([max(cell["canary"].values()) for cell in runs], "+"),
            f"{statistics.mean(cell['seconds'] for cell in runs):.0f}",
            " ".join(cell["verdict"] for cell in runs),
        )
    return table


def _shown(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1%}{spread}"


if __name__ == "__main__":
    typer.run(main)
