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
MARGINS = {"accuracy": "5pt", "rare": "8pt", "canary": "3%"}
"""What the lab accepts, fixed before the seeds that docs/log.md reports were run: probes of 100 to
400 items cannot decide on the gate's default of 2 points, nor 60 texts of a domain whose losses
spread widely on 1 %."""
DOCUMENTS = 120
"""Of each domain's canary. With 40 the error of a rise is about as large as the margin's room."""
NAIVE = [
    *LENGTH,
    "levers.adapter=none",
    "levers.kl_anchor=none",
    "levers.budget.spike=0",
    "train.batch_tokens=256",
    "train.keep=last",
]
"""Plain full fine-tuning: as many passes over the lesson, as many of its tokens in a step, the same
learning rate, schedule and clipping."""
HOLDFAST = [*LENGTH]
"""What two arguments give: on so small a model, full fine-tuning with the anchor."""


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


def demo(out: Path, console: Console, *, seed: int = 0) -> int:
    """Teach the lab's lesson twice and print one table; returns the exit code of holdfast's gate.

    Args:
        seed: of lesson, probes, canary and training.

    Raises RequestError when `out` is in use.
    """
    from holdfast.artifact import RunFolder
    from holdfast.run import train

    RunFolder.create(out)
    files = write_files(out / "data", seed=seed, documents_a_domain=DOCUMENTS)
    console.print(
        "Fine-tuning teaches a model something new and quietly takes away what it knew. Here a "
        "3M-parameter model that can add, knows capitals, writes small functions and speaks some "
        "Spanish learns eight irregular verbs: first by plain fine-tuning, then with holdfast.\n"
    )
    results: dict[str, RunResult] = {}
    for name, words in (("naive", NAIVE), ("holdfast", HOLDFAST)):
        console.print(f"training {name} ...")
        results[name] = train(lab_recipe(files, out / name, words, seed=seed), console=console)
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
