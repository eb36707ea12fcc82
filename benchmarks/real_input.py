"""The main job on a real checkpoint and real data: what each arm learns, and what it forgets.

    python benchmarks/real_input.py                  # ../shared: realtext4m, MedQuAD
    python benchmarks/real_input.py --model M --data lesson.jsonl --canary text.jsonl

Without --model it reads a 4M-parameter checkpoint and public data from ../shared, where that is
there: lesson MedQuAD, canary held-out Python, prose, stories, Spanish and textbooks, probes BLiMP
(minimal pairs by likelihood) and the likelihood of LAMBADA's last words.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from holdfast.data.contamination import overlaps
from holdfast.data.rows import Source, iter_rows
from holdfast.data.texts import row_texts, text_of
from holdfast.recipe import load_recipe
from holdfast.run import train

SHARED = Path(__file__).resolve().parents[2] / "shared"
DOMAINS = ("python", "docs", "stories_en", "physics_es", "textbooks")


def shared_input(folder: Path, rows: int) -> dict[str, Any]:
    """Model, lesson, canary and probes from ../shared."""
    lesson = SHARED / "data" / "lessons" / "medquad_train_3000.jsonl"
    if not SHARED.is_dir():
        raise typer.BadParameter("no ../shared here; give --model and --data")
    text = SHARED / "data" / "text"
    return {
        "model": str(SHARED / "models" / "realtext4m"),
        "data": {"sources": [{"path": str(lesson), "limit": rows}]},
        "canary": {
            "sources": [{"path": str(text / f"{d}_heldout.jsonl"), "domain": d} for d in DOMAINS]
        },
        "probes": [str(blimp(folder)), str(lambada(folder))],
    }


def blimp(folder: Path) -> Path:
    """67 paradigms of 30 minimal pairs; pairs of a paradigm are one cluster."""
    lines = (SHARED / "data" / "benchmarks" / "blimp_67x60.jsonl").read_text().splitlines()
    items = []
    for number, line in enumerate(lines[::2]):
        pair = json.loads(line)
        items.append(
            {
                "id": f"blimp-{number}",
                "probe": "blimp",
                "kind": "choice",
                "prompt": "",
                "choices": [pair["sentence_good"], pair["sentence_bad"]],
                "answer": 0,
                "cluster": pair["UID"],
            }
        )
    return _write(folder / "blimp.jsonl", items)


def lambada(folder: Path) -> Path:
    """Nats a token of the last word, 500 passages."""
    lines = (SHARED / "data" / "benchmarks" / "lambada_1000.jsonl").read_text().splitlines()
    items = []
    for number, line in enumerate(lines[::2]):
        row = json.loads(line)
        items.append(
            {
                "id": f"lambada-{number}",
                "probe": "lambada",
                "kind": "nll",
                "prompt": row["context"],
                "target": " " + row["continuation"].strip(),
            }
        )
    return _write(folder / "lambada.jsonl", items)


def _write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def replayed(folder: Path) -> list[str]:
    """The base's own kinds of text, without the rows that are also in the canary: a few are."""
    text, paths = SHARED / "data" / "text", []
    for domain in DOMAINS:
        source = Source(path=str(text / f"{domain}_train.jsonl"))
        heldout = Source(path=str(text / f"{domain}_heldout.jsonl"))
        secrets = list(row_texts([heldout]))
        leaked = {o.row for o in overlaps(row_texts([source]), secrets) if o.contaminated}
        rows = [row for row in iter_rows(source) if text_of(row).where not in leaked]
        print(f"{domain}: {len(leaked)} rows left out of replay", flush=True)
        paths.append(str(_write(folder / f"{domain}.jsonl", [dict(row.content) for row in rows])))
    return paths


def arms(folder: Path | None) -> dict[str, list[str]]:
    """What is compared; replay of the base's own pretraining text only where it is known."""
    plain = ["levers.kl_anchor=none", "levers.adapter.method=lora"]
    found = {
        "naive full fine-tuning": ["levers=none"],
        "LoRA on all linear, no anchor": [*plain, "levers.adapter.target=all-linear"],
        "LoRA on MLP, no anchor": plain,
        "holdfast default": [],
        "holdfast, LoRA on MLP": ["levers.adapter.method=lora"],
    }
    if folder is not None:
        found["holdfast, KL on replay"] = [
            "levers.kl_anchor.self_generated.fraction=0",
            "levers.replay.fraction=0.5",
            f"levers.replay.sources={json.dumps(replayed(folder))}",
        ]
    return found


def main(
    model: str | None = None,
    data: str | None = None,
    canary: Annotated[list[str] | None, typer.Option(help="Held-out text; empty: samples")] = None,
    epochs: float = 1.0,
    rows: int = 3000,
    seed: int = 0,
    threads: int = 2,
    only: Annotated[str | None, typer.Option(help="Arms whose name contains this")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="'NAME: key=value ...'")] = None,
) -> None:
    """Train each arm once and print the table."""
    torch.set_num_threads(threads)
    with TemporaryDirectory() as scratch:
        given: dict[str, Any] = (
            {"model": model, "data": data, "canary": {"sources": canary or []}}
            if model and data
            else shared_input(Path(scratch), rows)
        )
        columns: dict[str, dict[str, str]] = {}
        chosen = {a.partition(":")[0]: a.partition(":")[2].split() for a in arm or ()}
        for number, (name, words) in enumerate(
            (chosen or arms(None if model else Path(scratch))).items()
        ):
            if only and only not in name:
                continue
            settings = [f"train.epochs={epochs}", f"seed={seed}", *words]
            out = str(Path(scratch) / str(number))
            result = train(load_recipe(None, settings, **given, out=out))
            assert result.verdict is not None
            base = columns.setdefault("base", {})
            cells = columns.setdefault(name, {"verdict": str(result.verdict.verdict)})
            for row in result.verdict.rows:
                key = f"{row.meter} {row.name}"
                base[key] = f"{row.before:.3f} ±{row.before_stderr:.3f}"
                cells[key] = f"{row.difference:+.3f} [{row.lower:+.3f}, {row.upper:+.3f}]"
            cells["relative displacement"] = f"{result.summary['relative_displacement']:.4f}"
            cells["steps"] = str(result.summary["steps"])
            print(json.dumps({name: cells}), flush=True)
    table = Table(
        title=f"change from the base [95 % bounds]; {rows} rows, {epochs} epochs, seed {seed}"
    )
    table.add_column("")
    for name in columns:
        table.add_column(name)
    for key in dict.fromkeys(key for cells in columns.values() for key in cells):
        table.add_row(key, *(cells.get(key, "") for cells in columns.values()))
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
