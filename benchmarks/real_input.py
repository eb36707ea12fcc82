"""The main job on a real checkpoint and real data: what each arm learns, and what it forgets.

    python benchmarks/real_input.py --seeds 2        # ../shared: realtext4m, MedQuAD
    python benchmarks/real_input.py --model M --data rows.jsonl --heldout new.jsonl --canary t.jsonl

Without --model it reads a 4M-parameter checkpoint and public data from ../shared, where that is
there: lesson MedQuAD (its own held-out questions say what was learned), canary held-out Python,
prose, stories, Spanish and textbooks, probes BLiMP (minimal pairs by likelihood) and the likelihood
of LAMBADA's last words. Whatever trained a model, `holdfast.compare` reads it beside the base.
Every arm trains at the automatic rate of its mode, with as many of the lesson's tokens in a step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from holdfast.compare import Texts, compare
from holdfast.data.contamination import overlaps
from holdfast.data.rows import Source, iter_rows
from holdfast.data.texts import row_texts, text_of
from holdfast.levers.budget import Budget
from holdfast.meters.canary import Canary
from holdfast.recipe import load_recipe
from holdfast.run import train

sys.path.append(str(Path(__file__).resolve().parent / "forgetting"))

from arms import PLAIN

SHARED = Path(__file__).resolve().parents[2] / "shared"
LESSON = 512
"""Tokens of the lesson in a step."""
DOMAINS = ("python", "docs", "stories_en", "physics_es", "textbooks")


def shared_input(folder: Path, rows: int) -> dict[str, Any]:
    """Model, lesson, what tells what was learned, canary and probes from ../shared."""
    if not SHARED.is_dir():
        raise typer.BadParameter("no ../shared here; give --model, --data, --heldout and --canary")
    lessons, text = SHARED / "data" / "lessons", SHARED / "data" / "text"
    taught = (lessons / "medquad_train_3000.jsonl").read_text(encoding="utf-8").splitlines()
    lesson = _write(folder / "lesson.jsonl", [json.loads(line) for line in taught[:rows]])
    canary = [{"path": str(text / f"{d}_heldout.jsonl"), "domain": d} for d in DOMAINS]
    return {
        "model": str(SHARED / "models" / "realtext4m"),
        "data": str(lesson),
        "heldout": str(lessons / "medquad_test_300.jsonl"),
        "canary": canary,
        "probes": [str(blimp(folder)), str(lambada(folder))],
    }


def blimp(folder: Path) -> Path:
    """67 paradigms of 15 minimal pairs; pairs of a paradigm are one cluster."""
    lines = (SHARED / "data" / "benchmarks" / "blimp_67x60.jsonl").read_text().splitlines()
    items = []
    for number, line in enumerate(lines[::4]):
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
    """Nats a token of the last word, 250 passages."""
    lines = (SHARED / "data" / "benchmarks" / "lambada_1000.jsonl").read_text().splitlines()
    items = []
    for number, line in enumerate(lines[::4]):
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


def arms(folder: Path | None) -> dict[str, list[str] | None]:
    """What is compared, None for trl; replay of the base's pretraining text where it is known."""
    lora = ["levers.kl_anchor=none", "levers.adapter.method=lora"]
    found: dict[str, list[str] | None] = {
        "full fine-tuning": PLAIN,
        "trl LoRA": None,
        "holdfast default": [],
        "holdfast, budget 1 %": ["budget.forgetting=1%"],
        "LoRA on MLP, no anchor": lora,
        "holdfast, LoRA on MLP": ["levers.adapter.method=lora"],
    }
    if folder is not None:
        found["holdfast, KL on replay"] = [
            "levers.kl_anchor.self_generated.fraction=0",
            "levers.replay.fraction=0.5",
            f"levers.replay.sources={json.dumps(replayed(folder))}",
        ]
    return found


def tuned(words: list[str] | None, given: dict[str, Any], out: Path, steps: int, seed: int) -> str:
    """Train an arm; the folder of what came of it."""
    if words is None:
        from peers import trl_lora

        rate = Budget().peak(AutoConfig.from_pretrained(given["model"]), adapter=True)
        return trl_lora(given["model"], Path(given["data"]), out, rate, steps, seed)
    bare = not {"levers.kl_anchor=none"}.isdisjoint(words)
    settings = [
        f"train.steps={steps}",
        f"train.batch_tokens={LESSON if bare else 2 * LESSON}",
        "gate.enabled=false",
        "alarms=none",
        "data.heldout=0",
    ]
    recipe = load_recipe(
        None,
        [*settings, *words],
        model=given["model"],
        data=given["data"],
        canary={"sources": given["canary"], "max_documents": 40},
        out=str(out),
        seed=seed,
    )
    train(recipe)
    return str(out)


def main(
    model: str | None = None,
    data: str | None = None,
    heldout: Annotated[str | None, typer.Option(help="Rows like --data's, not trained on")] = None,
    canary: Annotated[list[str] | None, typer.Option(help="Held-out text; empty: samples")] = None,
    steps: int = 150,
    rows: int = 1000,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 1,
    threads: int = 2,
    only: Annotated[list[str] | None, typer.Option(help="Arms whose name contains this")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="'NAME: key=value ...'")] = None,
) -> None:
    """Train each arm once a seed and print the table."""
    torch.set_num_threads(threads)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        given: dict[str, Any] = (
            {"model": model, "data": data, "heldout": heldout, "canary": canary, "probes": []}
            if model and data and heldout
            else shared_input(folder, rows)
        )
        replays = folder if not model and not only and not arm else None
        asked = {a.partition(":")[0]: a.partition(":")[2].split() for a in arm or ()}
        columns: dict[str, dict[str, str]] = {}
        for name, words in (asked or arms(replays)).items():
            if only and not any(part in name for part in only):
                continue
            for seed in range(seeds):
                started = time.process_time()
                path = tuned(words, given, folder / f"{name} {seed}", steps, seed)
                seconds = time.process_time() - started
                texts = Texts(
                    Canary.model_validate({"sources": given["canary"] or []}),
                    given["probes"],
                    lesson=[Source(path=given["heldout"])],
                )
                found = compare(given["model"], path, texts, seed=seed)
                cells = columns.setdefault(f"{name}, seed {seed}", {})
                cells["verdict"] = str(found.verdict.verdict)
                base = columns.setdefault("base", {})
                for row in found.verdict.rows:
                    base[f"{row.meter} {row.name}"] = f"{row.before:.3f} ±{row.before_stderr:.3f}"
                    cells[f"{row.meter} {row.name}"] = (
                        f"{row.difference:+.3f} [{row.lower:+.3f}, {row.upper:+.3f}]"
                    )
                cells["training, CPU s"] = f"{seconds:.0f}"
                print(json.dumps({f"{name}, seed {seed}": cells}), flush=True)
    keys = dict.fromkeys(key for cells in columns.values() for key in cells)
    table = Table(title=f"change from the base [95 % bounds]; {rows} rows, {steps} steps")
    table.add_column("")
    for key in keys:
        table.add_column(key)
    for name, cells in columns.items():
        table.add_row(name, *(cells.get(key, "") for key in keys))
    Console(width=240).print(table)


if __name__ == "__main__":
    typer.run(main)
