"""`holdfast watch`: a run as its folder shows it, while it goes on or when it is over."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

SECONDS = 1.0
"""Between two looks at the folder."""
LOSSES = ("loss", "grad_norm", "learning_rate")
LISTED = ("canary", "probe", "lesson", "fall", "evidence")
"""Meters that are read while training, in the order of the table."""


@dataclass(frozen=True)
class View:
    """What a run folder shows now."""

    folder: str
    step: int
    steps: int | None
    """Of the whole run; None where another trainer knows."""
    finished: bool
    verdict: str | None
    losses: dict[str, float | None]
    """Training's own latest values, by meter/name."""
    readings: list[dict[str, Any]]
    """meter, name, split, step, value, stderr, n, unit; `before` is the first value."""
    alarms: list[dict[str, Any]]
    """step, name, text; in order."""


def watch(
    folder: Annotated[Path, typer.Argument(help="A run folder, of a run or a Guard.")],
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object once, instead of the view.")
    ] = False,
) -> None:
    """Show a run live: progress, losses, readings with their errors, alarms.

    It reads the run folder and nothing else, and ends with the run. Exit codes: 0 done, 2 no run
    folder.
    """
    view = look(folder)
    if as_json:
        print(json.dumps(asdict(view), indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if once or view.finished or not console.is_terminal:
        console.print(_shown(view))
        return
    try:
        with Live(_shown(view), console=console, auto_refresh=False) as live:
            while not view.finished:
                time.sleep(SECONDS)
                view = look(folder)
                live.update(_shown(view), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None  # of watching, not of the run


def look(path: Path) -> View:
    """Read a run folder. Raises RequestError where it is none."""
    from holdfast.artifact import RunFolder

    folder = RunFolder(path)
    if not folder.recipe.is_file() and not folder.readings.is_file():
        raise RequestError(
            f"'{path}' is no run folder (neither recipe.yaml nor readings.jsonl in it); give the "
            "folder named by --out when the run was started"
        )
    resolved = folder.read_recipe()["resolved"] if folder.recipe.is_file() else {}
    records, lines = folder.records(), folder.alarm_lines()
    verdict = _verdict(folder.path / "verdict.json", folder.readings)
    latest = {(r["meter"], r["name"], r["split"]): r for r in records}
    first = {(r["meter"], r["name"], r["split"]): r["value"] for r in reversed(records)}
    return View(
        folder=str(path),
        step=max((r["step"] for r in records), default=0),
        steps=resolved.get("steps"),
        finished=verdict is not None,
        verdict=verdict.get("verdict") if verdict else None,
        losses={f"{m}/{n}": _number(r["value"]) for (m, n, _), r in latest.items() if m in LOSSES},
        readings=[
            {
                **{k: r[k] for k in ("meter", "name", "split", "step", "n", "unit")},
                "before": _number(first[key]) if r["meter"] not in ("fall", "evidence") else None,
                "value": _number(r["value"]),
                "stderr": _number(r["stderr"]),
            }
            for key, r in sorted(latest.items(), key=lambda one: _place(one[0]))
            if r["meter"] in LISTED
        ],
        alarms=[{"step": line["step"], **alarm} for line in lines for alarm in line["alarms"]],
    )


def _verdict(file: Path, readings: Path) -> dict[str, Any] | None:
    """The verdict of a run that is over; after a resumption an old one is older than readings."""
    if not file.is_file():
        return None
    if readings.is_file() and readings.stat().st_mtime_ns > file.stat().st_mtime_ns:
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _place(key: tuple[str, str, str]) -> tuple[int, str, str]:
    meter, name, split = key
    return LISTED.index(meter) if meter in LISTED else len(LISTED), name, split


def _number(value: float | None) -> float | None:
    """A value as JSON knows it."""
    return value if value is not None and math.isfinite(value) else None


def _shown(view: View) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    of = f" of {view.steps}" if view.steps else ""
    state = view.verdict or ("done" if view.finished else "training")
    bar = ProgressBar(total=view.steps or 1, completed=view.step if view.steps else 0, width=40)
    head.add_row(Text(view.folder), bar, Text(f"step {view.step}{of}"), Text(state, style="bold"))
    losses = "   ".join(
        f"{name.removesuffix('/total')} {'—' if value is None else f'{value:.4g}'}"
        for name, value in view.losses.items()
    )
    alarms = [
        Text(f"alarm at step {a['step']}: {a['text']}", style="bold red") for a in view.alarms
    ]
    return Group(head, Text(losses, style="dim"), _table(view), *(alarms or [Text("no alarm")]))


def _table(view: View) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("reading", "split", "step", "before", "now", "± error", "n", "unit"):
        right = heading not in ("reading", "split", "unit")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for r in view.readings:
        before, now, error = (
            "" if r[key] is None else f"{r[key]:.4g}" for key in ("before", "value", "stderr")
        )
        cells = (f"{r['meter']} {r['name']}", r["split"], str(r["step"]), before, now or "—", error)
        table.add_row(*map(escape, (*cells, str(r["n"]), r["unit"])))
    return table
