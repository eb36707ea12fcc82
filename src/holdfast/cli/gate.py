"""`holdfast gate`: may this model be released? For a CI system: exit codes, JUnit, Markdown."""

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
    validated,
)
from holdfast.errors import RequestError
from holdfast.files import require_writable, write_text

if TYPE_CHECKING:
    from rich.console import Console

    from holdfast.gate.file import GateFile
    from holdfast.gate.margins import Gate
    from holdfast.gate.release import Release

LOOKS, SUITES = "looks at the sealed items:", '<testsuites name="holdfast gate"'
"""What the page for people and the one for CI systems are known by."""


def gate(
    base: Annotated[str, typer.Argument(help="Before; or a finished run, alone.")],
    tuned: Annotated[str | None, typer.Argument(help="After: model, adapter, run, hub id.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--gate", help="A gate file (docs/gate.md), or a recipe with a gate section."),
    ] = None,
    margin: Margins = None,
    canary: Canaries = None,
    probes: Probes = None,
    out: Annotated[Path, typer.Option(help="Where the verdict goes.")] = Path("verdict.json"),
    markdown: Annotated[
        Path | None, typer.Option(help="A file for the table, as a pull request shows it.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="A file for JUnit XML.")] = None,
    tokenizer: Tokenizer = None,
    dtype: Precision = "auto",
    run_generated_code: RunCode = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the base's own samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Judge a model on the sealed split: may it be released?

    Of a run folder, margins, canary and probes are the run's, where none are given. A run folder
    alone is judged by the readings it ended with. Exit codes: 0 PASS, 3 FAIL, 4 INCONCLUSIVE, 2
    the request was wrong; without 0 there is no PASS anywhere.
    """
    files = [path for path in (out, markdown, junit) if path is not None]
    _clear(out, files)
    given = {
        "margins": margins_of(margin),
        "probes": probes,
        "canary": canary,
        "run_generated_code": run_generated_code,
    }
    from rich.console import Console

    console = Console(stderr=as_json)
    if tuned is None:
        found = _run_alone(base, file, given)
    else:
        from holdfast.gate.release import release

        terms = _terms(tuned, file, given)
        if not terms.probes and not terms.canary.sources:
            console.print("no --probes and no --canary: the base writes the text that is judged")
        found = release(
            base,
            tuned,
            terms,
            tokenizer=tokenizer,
            dtype=dtype_of(dtype),
            seed=seed,
            console=console,
        )
    _write(found, out, markdown, junit, f"{base} -> {tuned}" if tuned else base)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        _show(found, console, files)
    raise typer.Exit(found.verdict.exit_code)


def _clear(out: Path, files: list[Path]) -> None:
    """Take away what an earlier gate left: after a crash there must be no verdict at all.

    A file under the verdict's name that holds no verdict, or a run's own, is refused instead.
    """
    for path in files:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise RequestError(f"'{path}' cannot be written; give a file in a folder that exists")
        require_writable(path)
    if len({path.absolute() for path in files}) < len(files):
        raise RequestError("--out, --markdown and --junit name one file; give each its own")
    for path in files:
        if path.exists() and not _is_ours(path):
            raise RequestError(
                f"'{path}' was not written by `holdfast gate` and is not overwritten; give another "
                "name, or remove it"
            )
    for path in files:
        path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether `_write` wrote a file: a record, or text with what only its pages have."""
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text) if text.startswith("{") else {}
    except (OSError, ValueError):
        return False
    return {"verdict", "looks"} <= record.keys() or LOOKS in text or SUITES in text


def _terms(tuned: str, file: Path | None, given: dict[str, Any]) -> GateFile:
    """The gate file's, else those of the run; what was given beside goes over it."""
    from holdfast.gate.file import GateFile, load_gate_file
    from holdfast.pair import recipe_of_run

    if file is not None:
        terms = load_gate_file(file)
    elif (recipe := recipe_of_run(tuned)) is not None:
        terms = GateFile.of_recipe(recipe)
    else:
        terms = GateFile()
    over = {key: value for key, value in given.items() if value}
    if "canary" in over:
        over["canary"] = {"sources": over["canary"]}
    over["margins"] = {**terms.margins, **given["margins"]}
    return validated(GateFile, {**terms.model_dump(), **over}, "holdfast gate")


def _run_alone(run: str, file: Path | None, given: dict[str, Any]) -> Release:
    """A run by its own readings; nothing else can be read here."""
    from holdfast.gate.readings import judge_run

    other = [name for name in ("probes", "canary", "run_generated_code") if given[name]]
    if other:
        raise RequestError(
            f"--{other[0].replace('_', '-')}: a run alone is judged by what it has read; to read "
            f"other texts give both: holdfast gate BASE {run}"
        )
    return judge_run(Path(run).expanduser(), _margins_alone(file, given["margins"], run))


def _margins_alone(file: Path | None, margins: dict[str, str], run: str) -> Gate | None:
    from holdfast.gate.file import GateFile, load_gate_file
    from holdfast.gate.margins import Gate

    if file is None and not margins:
        return None
    if file is None:
        from holdfast.recipe import load_recipe

        terms: Gate = load_recipe(Path(run) / "recipe.yaml").gate
    else:
        terms = load_gate_file(file)
        beyond = set(GateFile.model_fields) - set(Gate.model_fields)
        if set_beside := sorted(terms.model_fields_set & beyond):
            raise RequestError(
                f"{file}: {set_beside[0]}: a run alone is judged by what it has read; leave it "
                f"out, or give both: holdfast gate BASE {run}"
            )
    values = {name: getattr(terms, name) for name in Gate.model_fields} | {"enabled": True}
    return validated(Gate, {**values, "margins": {**terms.margins, **margins}}, "--margin")


def _write(found: Release, out: Path, markdown: Path | None, junit: Path | None, name: str) -> None:
    """The verdict last: where it is there, all is."""
    from holdfast.gate.junit import junit as as_junit

    seconds = float(found.about.get("seconds", 0.0))
    if junit is not None:
        write_text(junit, as_junit(found.verdict, name, seconds))
    if markdown is not None:
        write_text(markdown, f"{found.verdict.markdown()}\n{_looks(found)}\n")
    write_text(out, json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n")


def _show(found: Release, console: Console, files: list[Path]) -> None:
    console.print(found.verdict.table())
    for line in (
        _looks(found),
        f"items judged: {found.about['items']}",
        f"written: {', '.join(map(str, files))}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _looks(found: Release) -> str:
    return f"{LOOKS} {found.looks.sentence(found.verdict.alpha)}"
