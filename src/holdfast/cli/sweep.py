"""`holdfast sweep`: search a recipe's settings for what learns most and forgets least."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.options import AsJson
from holdfast.errors import RequestError

if TYPE_CHECKING:
    from rich.table import Table

    from holdfast.sweep import Swept


def sweep(
    settings: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE.yaml|key=value", help="A recipe, and settings over it."),
    ],
    over: Annotated[
        list[str] | None,
        typer.Option(help="What is searched: key=low:high[:log] or key=[a, b]; once or more."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials of the whole study.")] = 16,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no trial that would end later than that.")
    ] = None,
    forget: Annotated[
        str | None, typer.Option(metavar="1%", help="The margin of the canary, or 2pt of probes.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder to write; a search begun there goes on.")
    ] = Path("runs/sweep"),
    storage: Annotated[
        str | None, typer.Option(help="URL of a database that several machines share.")
    ] = None,
    study: Annotated[str, typer.Option(help="Name of the search in that database.")] = "sweep",
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is proposed.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Search a recipe's settings: more target, less forgetting.

    Only the selection split is read. Ends with the frontier, a picture, a recipe for each point on
    it, and the one recommended. Exit codes: 0 a trial is within every margin, 3 none is, 2 the
    request was wrong.
    """
    from rich.console import Console

    from holdfast import sweep as sweeping
    from holdfast.gate.margins import in_short
    from holdfast.space import parse_axes

    words = list(settings)
    recipe = Path(words.pop(0)) if words[0].endswith((".yaml", ".yml")) else None
    if forget is not None:
        words += [f"gate.margins.{key}={text}" for key, text in in_short(forget).items()]
    if out.is_file():
        raise RequestError(f"--out: '{out}' is a file; give a folder")
    found = sweeping.sweep(
        recipe,
        words,
        parse_axes(over or ()),
        out,
        trials=trials,
        minutes=minutes,
        storage=storage,
        study=study,
        seed=seed,
        console=Console(stderr=as_json),
    )
    if as_json:
        print(json.dumps(_record(found, out), indent=2, ensure_ascii=False))
    else:
        _show(found, out)
    raise typer.Exit(0 if found.recommended else 3)


def _record(found: Swept, out: Path) -> dict[str, object]:
    return {
        "frontier": [asdict(one) for one in found.frontier],
        "recommended": asdict(found.recommended) if found.recommended else None,
        "trials": len(found.trials),
        "pruned": found.pruned,
        "seconds": round(found.seconds, 1),
        "folder": str(out),
    }


def _show(found: Swept, out: Path) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(found))
    if found.recommended:
        line = f"recommended: {out / 'recommended.yaml'} (trial {found.recommended.number})"
    else:
        line = "no trial is within every margin; widen what is searched, or accept more"
    for text in (line, f"picture: {out / 'frontier.html'}", f"recipes: {out / 'recipes'}"):
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(found: Swept) -> Table:
    """The frontier on the selection split."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    over = f"{len(found.trials)} trials ran to their end, {found.pruned} were given up"
    table = Table(box=box.SIMPLE, pad_edge=False, caption=f"on the selection split; {over}")
    for heading in ("trial", "target", "worst fall, in margins", "of", "settings"):
        right = heading in ("trial", "target", "worst fall, in margins")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for one in found.frontier:
        style = "bold" if one is found.recommended else None if one.within else "dim"
        cells = (str(one.number), f"{one.target:.4g}", f"{one.worst:.2f}", one.culprit, one.words)
        table.add_row(*map(escape, cells), style=style)
    return table
