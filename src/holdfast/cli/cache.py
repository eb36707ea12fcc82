"""`holdfast cache`: store the base's probabilities once, so that training needs no second model."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from holdfast.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.data.example import Role
    from holdfast.prepare import Prepared

app = typer.Typer(help="The base's probabilities for the rows of a run, stored once.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command()
def build(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE.yaml|key=value",
            help="The run's recipe, and settings over it.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base: a folder or hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="The lesson: a file, folder or hub id.")] = None,
    out: Annotated[Path, typer.Option(help="The cache's folder.")] = Path("cache"),
    shard: Annotated[str, typer.Option(help="Which part of the work, such as 2/4.")] = "1/1",
    on: Annotated[
        Literal["anchor", "task", "both"] | None,
        typer.Option(help="Which rows; as levers.kl_anchor.on where it is not given."),
    ] = None,
    mass: Annotated[
        float | None, typer.Option(help="Probability that the listed tokens hold, 0 to 1.")
    ] = None,
    max_entries: Annotated[
        int | None, typer.Option(help="Tokens listed for it at most, 1 to 128.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(help="Tokens drawn of the rest, times its mass, 0 to 128."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="As levers.kl_anchor's where it is not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the base's probabilities for the rows that a run is anchored on.

    Started again after an interruption, it computes only what is missing.
    """
    part = _shard(shard)
    from holdfast.reference.encoding import Settings

    given: dict[str, Any] = {
        "mass": mass,
        "max_entries": max_entries,
        "draws": draws,
        "temperature": temperature,
    }
    kept = Settings(**{name: value for name, value in given.items() if value is not None})
    recipe = _recipe(settings, model=model, data=data)
    from holdfast.cli.preflight import preflight

    preflight(recipe.model_copy(update={"out": str(out / "run")}))  # a run's folder is not written
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import Progress

    from holdfast.plan import settled
    from holdfast.prepare import load, prepare
    from holdfast.reference.build import build as build_cache
    from holdfast.reference.cache import Identity, check

    if temperature is None:
        divergence = getattr(recipe.levers.kl_anchor, "divergence", None)
        kept = replace(kept, temperature=getattr(divergence, "temperature", 1.0))
    console = Console(stderr=as_json)
    recipe = settled(recipe)
    tokenizer, base = load(recipe, console)
    identity = Identity.of(base, tokenizer, kept.temperature)
    prepared = prepare(recipe, tokenizer, base, out / "data", console)
    rows = _rows(prepared, on or recipe.levers.kl_anchor.on)
    try:
        with Progress(console=console) as bar:
            task = bar.add_task("tokens", total=None)
            build_cache(
                base,
                rows,
                out,
                identity,
                kept,
                shard=part,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        hint = "interrupted; the same command continues it"
        typer.echo(f"holdfast: {hint}", err=True)
        raise typer.Exit(130) from None
    _show(out, check(out).as_dict(), as_json)


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(help="The folders of all shards.")],
    out: Annotated[Path, typer.Option(help="The folder of the whole cache.")],
    as_json: AsJson = False,
) -> None:
    """Join the shards of a cache: their files are moved, not copied."""
    from holdfast.reference.build import merge as merge_cache
    from holdfast.reference.cache import check

    merge_cache(shards, out)
    _show(out, check(out).as_dict(), as_json)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A cache, or a shard of one.")],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a cache and hold it against its checksums."""
    from holdfast.reference.cache import check as check_cache

    _show(folder, check_cache(folder).as_dict(), as_json)


def _shard(text: str) -> tuple[int, int]:
    """`i/n`, counted from 1."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise RequestError(f"--shard: '{text}' is not i/n with i from 1 to n; give one such as 1/4")
    return i, n


def _recipe(settings: list[str] | None, **options: str | None) -> Any:
    """The recipe as a run reads it, but for the cache that is to be built."""
    from holdfast.recipe import load_recipe

    words = list(settings or ())
    named = bool(words) and words[0].endswith((".yaml", ".yml"))
    recipe = load_recipe(words.pop(0) if named else None, words, **options)
    anchor = recipe.levers.kl_anchor
    without = {"cache": None, "reference": "auto"}
    known = {name: value for name, value in without.items() if name in type(anchor).model_fields}
    levers = recipe.levers.model_copy(update={"kl_anchor": anchor.model_copy(update=known)})
    return recipe.model_copy(update={"levers": levers})


def _rows(prepared: Prepared, on: str) -> Iterator[list[int]]:
    """The documents that the run may read and is anchored on, each once."""
    from holdfast.data.example import Role

    roles: dict[str, set[Role]] = {
        "anchor": {Role.ANCHOR},
        "task": {Role.TASK},
        "both": {Role.ANCHOR, Role.TASK},
    }
    rows = prepared.rows_of(roles[on])
    first = next(rows, None)
    if first is None:
        raise RequestError(
            f"cache build: the run has no {on} rows; give --on task, or a recipe with "
            "levers.kl_anchor.self_generated.fraction above 0"
        )
    return chain([first], rows)


def _show(folder: Path, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"folder": str(folder), **found}, indent=2))
        return
    print(
        f"{folder}: {found['documents']:,} rows, {found['positions']:,} tokens, "
        f"{found['bytes_a_token']:.1f} bytes a token, "
        f"{found['entries_a_position']:.1f} entries a position and "
        f"{found['draws_a_position']:.1f} drawn; every checksum is right"
    )
