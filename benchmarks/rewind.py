"""What is left of a naive run's lesson where every guardrail is within its margin, on the lab.

Each arm is plain fine-tuning, without anything that keeps the base. Of its checkpoints the rule of
`train.keep: best` takes one; then the last one is rewound towards the base.

python benchmarks/rewind.py
python benchmarks/rewind.py --arm "full fine-tuning"
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from holdfast.artifact import RunFolder
from holdfast.data.rows import Source
from holdfast.demo import MARGINS, NAIVE, lab_recipe
from holdfast.gate.verdict import Gate
from holdfast.lab import base_path, write_files
from holdfast.meters.canary import Canary
from holdfast.pair import Texts
from holdfast.report.frontier import HEADINGS, Mark, of_checkpoints
from holdfast.rewind import rewind
from holdfast.run import train

ARMS = {
    "full fine-tuning": NAIVE,
    "LoRA on all linear": [
        *(word for word in NAIVE if not word.startswith("levers.adapter")),
        "levers.adapter={method: lora, target: all-linear}",
    ],
}


def main(
    arm: Annotated[list[str] | None, typer.Option(help="Of ARMS; all of them by default.")] = None,
    seed: int = 0,
    threads: int = 1,
    every: Annotated[int, typer.Option(help="Of the probes' items every so many-th is read.")] = 4,
) -> None:
    """Train each arm, choose, rewind, and print the points of both."""
    torch.set_num_threads(threads)
    with TemporaryDirectory() as scratch:
        files = write_files(Path(scratch) / "data", seed=seed)
        lines = files["probes"].read_text().splitlines()
        files["probes"].write_text("\n".join(lines[::every]) + "\n")
        texts = Texts(Canary(sources=[Source(path=str(files["canary"]))]), [str(files["probes"])])
        for number, name in enumerate(arm or ARMS):
            started = time.perf_counter()
            out = Path(scratch) / str(number)
            words = [
                *ARMS[name],
                "train.keep=best",
                "train.measure_probes=true",
                "gate.target=report",
            ]
            run = train(lab_recipe(files, out, words, seed=seed))
            kept = int(str(run.summary["kept"]).split()[1])
            checkpoints = of_checkpoints(RunFolder(out).records(), kept)
            _print(f"{name}, seed {seed}: its checkpoints", checkpoints)
            print(f"kept: {run.summary['kept']}")
            print(f"of what is kept, sealed: {run.verdict.reason if run.verdict else ''}")
            last = out / "checkpoints" / f"checkpoint-{run.summary['steps']}"
            base = str(base_path())
            back = rewind(
                base, str(last), texts, gate=Gate(margins=MARGINS), tokenizer=base, seed=seed
            )
            _print(f"{name}, seed {seed}: rewound, by {back.summary['path']}", back.marks())
            for note in back.notes:
                print(f"note: {note}")
            print(f"of the point, sealed: {back.verdict.reason if back.verdict else 'the base'}")
            print(f"{time.perf_counter() - started:.0f} s\n", flush=True)


def _print(title: str, marks: list[Mark]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading)
    for mark in marks:
        table.add_row(*mark.cells())
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
