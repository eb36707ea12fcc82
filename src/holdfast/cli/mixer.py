"""`holdfast mixer`: freeze the mix that a model replays, once, and look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.errors import RequestError

if TYPE_CHECKING:
    from holdfast.data.mixer import Mixer
    from holdfast.data.rows import Source

app = typer.Typer(help="The mix of domains that a model replays, frozen for its life.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command()
def freeze(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[DOMAIN=]SOURCE...",
            help="Files, folders or hub ids, such as code=old/code.jsonl.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file; it must not exist yet.")],
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer counts: a folder or hub id.")
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(help="A domain's share of the tokens, such as code=0.3; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write domains, shares and what the sources hold now.

    Domains without --share get what is left, by their tokens.
    """
    shares = {}
    for text in share or ():
        domain, _, number = text.rpartition("=")
        try:
            shares[domain] = float(number)
        except ValueError:
            domain = ""
        if not domain:
            raise RequestError(f"--share: '{text}' is not domain=number; give one such as code=0.3")
    if out.exists():
        raise RequestError(
            f"--out: '{out}' exists already, and a mixer is kept for life; give another name"
        )
    from holdfast.data import mixer

    tokenizer = None
    if model is not None:
        from holdfast.model import Model, load_tokenizer

        tokenizer = load_tokenizer(Model(path=model))
    found = mixer.freeze([_source(text) for text in sources], tokenizer, shares)
    found.write(out)
    _print(out, found, (), as_json)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A mixer file, or the folder of a run.")],
    as_json: AsJson = False,
) -> None:
    """Show the shares, and whether the sources are still what was frozen.

    Exit code 2 where one is not.
    """
    from holdfast.data.mixer import FILE, read_mixer

    file = file / FILE if file.is_dir() else file
    found = read_mixer(file, field="mixer show")
    changed = tuple(found.changed())
    _print(file, found, changed, as_json)
    raise typer.Exit(2 if changed else 0)


def _source(text: str) -> Source:
    """`DOMAIN=SOURCE`, or a source whose name may hold a = itself."""
    from holdfast.data.rows import Source

    domain, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return Source(path=text)
    if not domain or not path:
        raise RequestError(f"'{text}' is not domain=source; give one such as code=old/code.jsonl")
    return Source(path=path, domain=domain)


def _print(file: Path, mixer: Mixer, changed: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        found: dict[str, Any] = mixer.model_dump(mode="json")
        print(json.dumps({"file": str(file), **found, "changed": changed}, indent=2))
        return
    for name, domain in mixer.domains.items():
        tokens = "" if domain.tokens is None else f", {domain.tokens:,} tokens counted"
        print(f"{name}: {domain.share:.2%}{tokens}")
    for source in mixer.sources:
        print(f"from {source.path} ({source.domain}), sha256 {source.sha256[:12]}")
    for line in changed:
        print(f"changed: {line}")
    print(f"mixer: {file}")
