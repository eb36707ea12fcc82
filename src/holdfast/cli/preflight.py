"""Everything about a run that can be checked before torch is imported, all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.artifact import RunFolder
from holdfast.data.readers import local_path
from holdfast.data.rows import RowSummary, Source, check_rows
from holdfast.errors import RequestError
from holdfast.gate.beforehand import capabilities, require_known
from holdfast.lineage import locate
from holdfast.meters.canary import OWN_SAMPLES
from holdfast.meters.probes import Item
from holdfast.model import check_folder
from holdfast.recipe import Recipe

HUB_ROWS = 100
"""Rows of a hub dataset that are looked at; those of local files are all read."""


@dataclass(frozen=True)
class Checked:
    """One sound source of the recipe."""

    field: str
    """Where the recipe names it: data, levers.replay, canary."""
    path: str
    rows: RowSummary
    sampled: bool
    """Whether only the first `HUB_ROWS` rows were read."""


@dataclass(frozen=True)
class Preflight:
    """What a sound recipe's files hold."""

    sources: tuple[Checked, ...]
    probe_items: int
    earlier_items: int
    """Of the stages before."""

    def lines(self) -> list[str]:
        """A line for each source, and one for the probes."""
        lines = [_line(checked) for checked in self.sources]
        counts = {"probes": self.probe_items, "probes of earlier stages": self.earlier_items}
        return [*lines, *(f"{name}: {count} items" for name, count in counts.items() if count)]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"ok": True, **asdict(self)}


def preflight(recipe: Recipe, *, resume: bool = False) -> Preflight:
    """Check model folder, run folder, rows and probes, and say what is in them.

    Raises:
        RequestError: every problem found, one line each.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except RequestError as error:
            problems.extend(error.problems)

    attempt(partial(check_folder, recipe.model))
    attempt(partial(_check_reference, recipe))
    attempt(partial(_check_out, Path(recipe.out), resume))
    attempt(recipe.levers.replay.check_mixer)
    groups: list[tuple[str, Sequence[Source]]] = [
        ("data", recipe.data.sources),
        ("levers.replay", attempt(recipe.levers.replay.sources_read) or ()),
        ("canary", recipe.canary.sources),
    ]
    sources = [attempt(partial(_check, name, source)) for name, group in groups for source in group]
    own, earlier, _ = attempt(recipe.items) or ([], [], [])
    if not problems:
        attempt(partial(_check_margins, recipe, [*own, *earlier], sources))
    if problems:
        raise RequestError(*dict.fromkeys(problems))
    return Preflight(tuple(sources), len(own), len(earlier))


def _check(field: str, source: Source) -> Checked:
    sampled = local_path(source.path) is None
    rows = check_rows(source, need_response=field == "data", max_rows=HUB_ROWS if sampled else None)
    return Checked(field, source.path, rows, sampled)


def _check_margins(recipe: Recipe, items: Sequence[Item], sources: Sequence[Checked]) -> None:
    """A margin that would guard nothing fails the gate; better said before training."""
    canary: dict[str, list[str]] = {}
    for checked in sources:
        if checked.field == "canary":
            unnamed = checked.rows.rows > sum(checked.rows.domains.values())
            names = [*checked.rows.domains, *([Path(checked.path).stem] if unnamed else [])]
            canary |= {name: [] for name in names}
            if checked.sampled:  # other rows may have other domains
                return
    require_known(recipe.gate, capabilities(items, canary or {OWN_SAMPLES: []}), "gate.margins")


def _check_reference(recipe: Recipe) -> None:
    """The stage or the cache that the anchor names."""
    anchor = recipe.levers.kl_anchor
    if not anchor.weight:
        return
    if anchor.cache is not None:
        from holdfast.reference.cache import Manifest

        Manifest.read(Path(anchor.cache))
    elif anchor.source(adapter=False)[0] == "stage":
        locate(anchor.reference, field="levers.kl_anchor.reference")


def _check_out(out: Path, resume: bool) -> None:
    """A new run needs a free folder; a resumed one the folder that it was started in."""
    files = [parent for parent in out.parents if parent.is_file()]
    if resume:
        RunFolder.open(out)
    elif files:
        raise RequestError(f"out: '{out}' cannot be made: '{files[0]}' is a file; give a folder")
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        RunFolder.create(out)  # says what is wrong; a free folder is not made here


def _line(checked: Checked) -> str:
    rows = checked.rows
    count = f"first {rows.rows:,}" if checked.sampled else f"{rows.rows:,}"
    domains = ", ".join(f"{name} {n:,}" for name, n in rows.domains.items())
    ignored = ", ".join(rows.ignored)
    return (
        f"{checked.field}: {checked.path}: {count} rows of {rows.format}, "
        f"{rows.characters:,} characters"
        + (f"; domains: {domains}" if domains else "")
        + (f"; keys not read: {ignored}" if ignored else "")
    )
