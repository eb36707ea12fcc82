"""`holdfast probes`: freeze a sample of a benchmark, check probe files, look at their items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from holdfast.meters.probes import Item

app = typer.Typer(help="Sets of items that a capability is measured with.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Probe files.")]


@app.command("import")
def import_(
    task: Annotated[
        str,
        typer.Argument(
            help="mmlu, gsm8k, humaneval, hellaswag, arc, multilingual, lambada, blimp, pubmedqa, "
            "refusal, format, json, tool_call, or any lm-eval task."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file; it must not exist yet.")],
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Items; 200, of multilingual 300.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[SPLIT=]PATH", help="Local data in place of the hub's; repeatable."),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    probe: Annotated[str | None, typer.Option(help="The probe's name; the task's.")] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(help="guardrail, target, rare, adoption, control or recovery; repeatable."),
    ] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", help="Which of the task's filters; its first.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest written answer; the task's.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the model's chat template.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Freeze a sample of a benchmark with its prompts as rendered."""
    if out.exists():
        raise RequestError(f"--out: '{out}' exists already; give another name")
    if not out.absolute().parent.is_dir():
        raise RequestError(f"--out: folder '{out.parent}' does not exist; make it, or give another")
    from holdfast.meters.importing import Frozen
    from holdfast.meters.probes import TAGS, load_items, write_items
    from holdfast.meters.probes.presets import PRESETS, Preset, import_probe

    for word in tag or ():
        if word not in TAGS:
            raise RequestError(f"--tag: '{word}' is none; {did_you_mean(word, TAGS)}")
    count = n or PRESETS.get(task, Preset("")).items
    how: dict[str, Any] = {"count": count, "seed": seed, "shots": shots, "data": tuple(data or ())}
    how |= {"probe": probe, "tags": tuple(tag or ["guardrail"]), "filter": filter_, "chat": chat}
    write_items(out, import_probe(task, Frozen(**how), max_new_tokens))
    _print(out, load_items([str(out)]), as_json)


@app.command()
def check(
    files: Files,
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer and context must hold them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for faulty items: each with its line. Exit code 2 where there is one."""
    from holdfast.meters.probes import load_items

    items = load_items(files)
    if model is not None:
        from transformers import AutoConfig

        from holdfast.lineage import locate
        from holdfast.meters.probes.encode import encode_items
        from holdfast.model import Model, load_tokenizer

        tokenizer = load_tokenizer(Model(path=model))
        stage = locate(model, None)
        encode_items(tokenizer, items, AutoConfig.from_pretrained(stage.model))
    _print(", ".join(files), items, as_json)


@app.command()
def show(
    files: Files,
    n: Annotated[int, typer.Option("--n", min=1, help="Items of each probe.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Show the first items of each probe: what is asked, and what is right."""
    from holdfast.meters.probes import load_items

    chosen: dict[str, list[Item]] = {}
    for item in load_items(files):
        if len(chosen.setdefault(item.probe, [])) < n:
            chosen[item.probe].append(item)
    items = [item for some in chosen.values() for item in some]
    if as_json:
        records = [item.model_dump(mode="json", exclude_defaults=True) for item in items]
        print(json.dumps({"items": records}, ensure_ascii=False, indent=2))
        return
    for item in items:
        print(f"--- {item.probe} {item.id} ({item.kind}; {', '.join(item.tags)})")
        print(item.prompts[item.answer or 0] if item.prompts else _text(item.prompt))
        for number, choice in enumerate(item.choices or ()):
            print(f"{'*' if number == item.answer else ' '} {choice!r}")
        if item.choices is None and item.targets:
            print(f"* {' | '.join(map(repr, item.targets))}")
        for one in item.checks:
            print(f"* {one.model_dump_json()}")
        if item.tests:
            print(f"* {item.tests}")


def _text(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"[{turn.get('role')}] {turn.get('content')}" for turn in prompt)


def _print(file: Path | str, items: list[Item], as_json: bool) -> None:
    probes: dict[str, dict[str, Any]] = {}
    for item in items:
        found = probes.setdefault(item.probe, {"kind": item.kind, "items": 0, "tags": []})
        found["items"] += 1
        found["tags"] = sorted({*found["tags"], *item.tags})
    if as_json:
        print(json.dumps({"file": str(file), "probes": probes}, indent=2))
        return
    for name, found in probes.items():
        print(f"{name}: {found['items']:,} {found['kind']} items ({', '.join(found['tags'])})")
    print(f"probes: {file}")
