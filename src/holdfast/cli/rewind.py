"""`holdfast rewind`: the largest step from base to tuned that forgets no more than is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.options import (
    AsJson,
    Canaries,
    Margins,
    Precision,
    Probes,
    RunCode,
    Tokenizer,
    dtype_of,
    margins_of,
    texts_of,
    validated,
)
from holdfast.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table

    from holdfast.gate.verdict import Gate
    from holdfast.rewind import Rewound


def rewind(
    base: Annotated[str, typer.Argument(help="Before: a model, adapter or run folder, a hub id.")],
    tuned: Annotated[str, typer.Argument(help="After: the same kinds.")],
    path: Annotated[
        str, typer.Option(help="auto, adapter (its scale), weights, blocks or checkpoints.")
    ] = "auto",
    rule: Annotated[
        str, typer.Option(help="estimate: the fall is within margin; shown: surely so.")
    ] = "estimate",
    margin: Margins = None,
    canary: Canaries = None,
    probes: Probes = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the adapter or model and report.html.")
    ] = None,
    tokenizer: Tokenizer = None,
    dtype: Precision = "auto",
    run_generated_code: RunCode = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the base's own samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find the largest step from base to tuned that keeps every guardrail.

    It is chosen on the selection split, and judged on the sealed one. Of a run folder, canary,
    probes and margins are the run's, where none are given. Exit codes: 0 passed, 3 the gate said
    FAIL or only the base is left, 4 the gate said INCONCLUSIVE, 2 the request was wrong.
    """
    texts = texts_of(canary, probes, run_generated_code) if canary or probes else None
    from rich.console import Console

    from holdfast import rewind as rewinding
    from holdfast.points import RULES

    found = rewinding.rewind(
        base,
        tuned,
        texts,
        path=_one_of("--path", path, rewinding.PATHS),
        rule=_one_of("--rule", rule, RULES),
        gate=_gate(margin, tuned),
        out=out,
        tokenizer=tokenizer,
        dtype=dtype_of(dtype),
        seed=seed,
        console=Console(stderr=as_json),
    )
    if as_json:
        print(json.dumps(_record(found), indent=2, ensure_ascii=False))
    else:
        _show(found, out)
    raise typer.Exit(found.verdict.exit_code if found.verdict else 3)


def _gate(margins: list[str] | None, tuned: str) -> Gate | None:
    """The run's gate, or the default one, with the command line's margins over it; None: none."""
    from holdfast.gate.verdict import Gate
    from holdfast.pair import of_run

    if not margins:
        return None
    theirs = of_run(tuned)
    gate = theirs[1] if theirs else Gate()
    over = {**gate.margins, **margins_of(margins)}
    return validated(Gate, {**gate.model_dump(), "margins": over}, "--margin")


def _one_of(option: str, word: str, allowed: tuple[str, ...]) -> Any:
    if word not in allowed:
        raise RequestError(f"{option}: '{word}' is none; {did_you_mean(word, allowed)}")
    return word


def _record(found: Rewound) -> dict[str, Any]:
    return {
        **found.summary,
        "frontier": [mark.as_record() for mark in found.marks()],
        "artifact": str(found.artifact) if found.artifact else None,
        "verdict": found.verdict.as_dict() if found.verdict else None,
    }


def _show(found: Rewound, out: Path | None) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(found))
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if found.verdict is None:
        console.print("no step from base to tuned keeps every guardrail: what is left is the base")
    else:
        console.print("on the sealed split, of what was chosen:")
        console.print(found.verdict.table())
    if found.artifact is not None:
        console.print(f"written: {found.artifact}", highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


def _table(found: Rewound) -> Table:
    """The frontier on the selection split."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from holdfast.report.frontier import HEADINGS

    table = Table(box=box.SIMPLE, pad_edge=False, caption="on the selection split")
    for heading in HEADINGS:
        right = heading in ("way", "target kept", "fall, in margins")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for mark in found.marks():
        style = "bold" if mark.chosen else None if mark.kept else "dim"
        table.add_row(*map(escape, mark.cells()), style=style)
    return table
