"""`holdfast eval` reads one checkpoint; `holdfast compare` two, whichever tool made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.options import (
    AsJson,
    Canaries,
    Lesson,
    Precision,
    Probes,
    RunCode,
    Tokenizer,
    dtype_of,
    texts_of,
)

if TYPE_CHECKING:
    from rich.table import Table

    from holdfast.meters import Reading

ONLY_OF_TWO = ("kl", "fisher", "canary_rise", "canary_kl", "canary_perplexity")
"""Readings that are shown below the verdict of two checkpoints."""

Out = Annotated[Path | None, typer.Option(help="A new folder for readings and report.html.")]


def evaluate(
    model: Annotated[str, typer.Argument(help="A model, adapter or run folder, or a hub id.")],
    canary: Canaries = None,
    probes: Probes = None,
    lesson: Lesson = None,
    out: Out = None,
    tokenizer: Tokenizer = None,
    dtype: Precision = "auto",
    run_generated_code: RunCode = False,
    as_json: AsJson = False,
) -> None:
    """Read one model: canary loss and probes, each with its error."""
    texts = texts_of(canary, probes, run_generated_code, lesson)
    from rich.console import Console

    from holdfast.compare import evaluate as read

    found = read(
        model,
        texts,
        out=out,
        tokenizer=tokenizer,
        dtype=dtype_of(dtype),
        console=Console(stderr=as_json),
    )
    if as_json:
        _print_json({"model": model, **found.summary, "readings": _records(found.readings)})
        return
    console = Console()
    console.print(_table(found.readings))
    _tell_report(console, out)


def compare(
    base: Annotated[str, typer.Argument(help="Before: a model, adapter or run folder, a hub id.")],
    tuned: Annotated[str, typer.Argument(help="After: the same kinds.")],
    canary: Canaries = None,
    probes: Probes = None,
    lesson: Lesson = None,
    out: Out = None,
    tokenizer: Tokenizer = None,
    dtype: Precision = "auto",
    run_generated_code: RunCode = False,
    ranks: Annotated[
        bool, typer.Option("--ranks", help="Find the rank of each matrix's change, too (slow).")
    ] = False,
    fisher: Annotated[
        bool, typer.Option("--fisher", help="Set the KL beside what the base's Fisher predicts.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the base's own samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints that some other tool made, and judge the difference.

    Without --canary the base writes the text. Exit codes: 0 passed, 3 the gate said FAIL, 4 the
    gate said INCONCLUSIVE, 2 the request was wrong.
    """
    texts = texts_of(canary, probes, run_generated_code, lesson)
    from rich.console import Console

    from holdfast.compare import compare as read

    found = read(
        base,
        tuned,
        texts,
        out=out,
        tokenizer=tokenizer,
        dtype=dtype_of(dtype),
        ranks=ranks,
        fisher=fisher,
        seed=seed,
        console=Console(stderr=as_json),
    )
    if as_json:
        _print_json(
            {
                "base": base,
                "tuned": tuned,
                "summary": found.summary,
                "verdict": found.verdict.as_dict(),
                "readings": _records([*found.before, *found.after]),
            }
        )
    else:
        console = Console()
        console.print(found.verdict.table())
        beside = [reading for reading in found.after if reading.meter in ONLY_OF_TWO]
        if beside:
            console.print(_table(beside))
        for name, value in found.summary.items():
            text = f"{value:.4g}" if isinstance(value, float) else value
            console.print(f"{name.replace('_', ' ')}: {text}", highlight=False, soft_wrap=True)
        _tell_report(console, out)
    raise typer.Exit(found.verdict.exit_code)


def _table(readings: Sequence[Reading]) -> Table:
    """Readings with one standard error each."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from holdfast.gate.render import show_value

    table = Table(box=box.SIMPLE, pad_edge=False, caption="± one standard error")
    for heading in ("meter", "what", "split", "value", "unit", "n", "seconds"):
        right = heading in ("value", "n", "seconds")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for reading in readings:
        stderr = float("nan") if reading.stderr is None else reading.stderr
        table.add_row(
            reading.meter.replace("_", " "),
            escape(reading.name),
            reading.split,
            show_value(reading.value, stderr, reading.unit),
            reading.unit,
            f"{reading.n:,}",
            f"{reading.seconds:.1f}",
        )
    return table


def _records(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    return [reading.as_record() for reading in readings]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _tell_report(console: Any, out: Path | None) -> None:
    if out is not None:
        console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
