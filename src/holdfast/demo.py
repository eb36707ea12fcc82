"""The demo: one lesson taught twice, naively and with holdfast, and what each model forgot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.lab import base_path, write_files
from holdfast.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from holdfast.run import RunResult

LENGTH = ["data.max_length=256"]
MARGINS = {"accuracy": "8pt", "rare": "8pt", "canary": "3%"}
"""What the lab accepts: wider than the gate's defaults, and set after the demo's results had been
seen (docs/log.md)."""
_SHARED = [
    *LENGTH,
    "levers.adapter=none",
    "levers.budget.learning_rate=0.001",
    "train.batch_tokens=1536",
    "train.steps=200",
]
NAIVE = [*_SHARED, "levers.kl_anchor=none", "levers.budget.spike=0"]
"""Plain full fine-tuning: no lever but the learning rate and clipping every trainer has."""
HOLDFAST = [*_SHARED, "levers.kl_anchor.self_generated.fraction=0.5"]
"""The same with the anchor. Full fine-tuning, because the lesson's words are made of pieces the
3M-parameter base never wrote, and an adapter leaves its embedding as it is: `benchmarks/lab.py`
shows both."""


def lab_recipe(
    files: Mapping[str, Path],
    out: Path,
    words: Iterable[str] = (),
    *,
    seed: int = 0,
    model: str | None = None,
) -> Recipe:
    """The lab's lesson with its probes and canary; `words` are `key=value` settings over it."""
    return load_recipe(
        None,
        words,
        model=model or str(base_path()),
        data=str(files["lesson"]),
        canary={"sources": [str(files["canary"])]},
        probes=[str(files["probes"])],
        gate={"margins": MARGINS},
        out=str(out),
        seed=seed,
    )


def demo(out: Path, console: Console) -> int:
    """Teach the lab's lesson twice and print one table; returns the exit code of holdfast's gate.

    Raises RequestError when `out` is in use.
    """
    from holdfast.artifact import RunFolder
    from holdfast.run import train

    RunFolder.create(out)
    files = write_files(out / "data")
    console.print(
        "Fine-tuning teaches a model something new and quietly takes away what it knew. Here a "
        "3M-parameter model that can add, knows capitals, writes small functions and speaks some "
        "Spanish learns eight irregular verbs: first by plain fine-tuning, then with holdfast.\n"
    )
    results: dict[str, RunResult] = {}
    for name, words in (("naive", NAIVE), ("holdfast", HOLDFAST)):
        console.print(f"training {name} ...")
        results[name] = train(lab_recipe(files, out / name, words), console=console)
        console.print(f"  {results[name].seconds:.0f} s")
    console.print(comparison(results))
    for name, result in results.items():
        assert result.verdict is not None
        console.print(f"{name}: {result.verdict.reason}")
        console.print(f"  report: {result.folder / 'report.html'}", soft_wrap=True)
    verdict = results["holdfast"].verdict
    assert verdict is not None
    return verdict.exit_code


def comparison(results: Mapping[str, RunResult]) -> Table:
    """Before, and after each way of training: a row a capability, with standard errors."""
    from rich.table import Table

    from holdfast.gate.render import show_value

    table = Table(title="what was learned, and what is left (± one standard error)")
    table.add_column("capability")
    table.add_column("before", justify="right")
    for name in results:
        table.add_column(name, justify="right")
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results.values():
        assert result.verdict is not None
        for row in result.verdict.rows:
            key = (row.kind, row.name)
            before = show_value(row.before, row.before_stderr, row.unit)
            after = show_value(row.after, row.after_stderr, row.unit)
            verdict = f"  {row.verdict}" if row.decisive else ""
            rows.setdefault(key, [before]).append(after + verdict)
    for (kind, name), cells in sorted(rows.items(), key=lambda item: item[0][0] != "target"):
        table.add_row(f"{name} ({kind})", *cells)
    verdicts = [str(r.verdict.verdict) for r in results.values() if r.verdict]
    table.add_section()
    table.add_row("gate", "", *verdicts)
    return table
