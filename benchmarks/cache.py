"""Bytes a token of a cache against the error of the gradient that training takes from it.

A student is drifted for real (a short fine-tuning on a lesson), then the gradient of the forward KL
to the base is taken from the base itself and from caches of several settings:

    hidden    ||g_cache - g_full|| / ||g_full||, g the gradients with respect to the last hidden
              states, all positions stacked
    weights   the same for the gradient with respect to all parameters, summed over the positions
              (the head frozen), at a quarter of them and at all of them

A list without draws errs in the same direction at every position, so that summing does not help;
with draws the error is noise, and falls as 1 / sqrt(positions).

    python benchmarks/cache.py                # the lab's base, and ../shared/models/realtext4m
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from holdfast import model as models
from holdfast.data.self_generated import generate
from holdfast.divergence import Divergence
from holdfast.lab import base_path, write_files
from holdfast.objective import Base, DenseBase, Head, token_losses
from holdfast.reference.build import build
from holdfast.reference.cache import Cached, Identity, check
from holdfast.reference.encoding import Settings

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = ("python", "docs", "stories_en", "physics_es", "textbooks")
SETTINGS = (
    Settings(mass=0.9, max_entries=4, draws=0),
    Settings(mass=0.9, max_entries=16, draws=0),
    Settings(mass=0.9, max_entries=32, draws=0),
    Settings(mass=0.99, max_entries=128, draws=0, resolution=2048),
    Settings(mass=0.999, max_entries=128, draws=0, resolution=8192),
    Settings(mass=0.2, max_entries=2, draws=4, resolution=256),
    Settings(mass=0.4, max_entries=6, draws=6, resolution=256),
    Settings(mass=0.5, max_entries=8, draws=10),
    Settings(mass=0.9, max_entries=8, draws=10),
    Settings(mass=0.9, max_entries=32, draws=32),
)
KINDS = ("text", "own samples")
BATCH = 4
"""Rows of one forward pass."""
KNOWN = "known stores: 114 bytes a token (k 50), 300 (k 128)"


def drifted(folder: str, lesson: Path, steps: int, rate: float) -> Any:
    """The model after a few steps on a lesson's prompts and completions."""
    settings = models.Model(path=folder)
    tokenizer = models.load_tokenizer(settings)
    student = models.load_model(settings, adapter=False, tokenizer=tokenizer)
    width = min(256, student.config.max_position_embeddings)
    text = (json.loads(line) for line in lesson.read_text(encoding="utf-8").splitlines())
    ids: list[int] = []
    for row in text:
        ids += tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate)
    size = 8 * width
    for step in range(steps):
        at = step * size % (len(ids) - size)
        batch = torch.tensor(ids[at : at + size]).view(8, width)
        student(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def real_rows(tokenizer: Any, files: list[Path], rows: int, width: int) -> list[list[int]]:
    """The beginnings of documents, as many of each file."""
    start = [tokenizer.bos_token_id]
    found = []
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in islice(lines, rows):
                ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
                found.append(start + ids[: width - 1])
    return found


def batches(rows: list[list[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """ids, positions, where the KL is asked for, and the next tokens."""
    for i in range(0, len(rows), BATCH):
        some = rows[i : i + BATCH]
        ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.long)
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        positions = torch.zeros_like(ids)  # padding: documents of one token, never asked for
        for b, row in enumerate(some):
            ids[b, : len(row)] = torch.tensor(row)
            positions[b, : len(row)] = torch.arange(len(row))
            wanted[b, : len(row) - 1] = True
        yield ids, positions, wanted, ids.roll(-1, 1)


class Errors:
    """Gradients of one setting beside the full ones, summed as they come."""

    def __init__(self) -> None:
        self.hidden = self.seconds = 0.0
        self.weights: list[Tensor] = []
        self.quarter: list[Tensor] = []

    def add(self, grads: tuple[Tensor, ...]) -> None:
        before = self.weights or [torch.zeros_like(grad) for grad in grads]
        self.weights = [a + b for a, b in zip(before, grads, strict=True)]


def gradient(hidden_MH: Tensor, head: Head, targets_M: Tensor, base: Base) -> tuple[Tensor, float]:
    """D sum KL / d hidden, and the mean KL."""
    hidden_MH = hidden_MH.detach().requires_grad_()
    every = torch.ones(len(hidden_MH), dtype=torch.bool)
    settings = Divergence()
    _, kl_M = token_losses(
        hidden_MH, head, targets_M, nll_N=~every, kl_N=every, base=base, divergence=settings
    )
    (grad_MH,) = torch.autograd.grad(kl_M.sum(), hidden_MH)
    return grad_MH, float(kl_M.detach().sum())


def relative(found: list[Tensor], full: list[Tensor]) -> float:
    """||found - full|| / ||full|| over all tensors."""
    off = sum(float((a - b).double().square().sum()) for a, b in zip(found, full, strict=True))
    return float((off / sum(float(a.double().square().sum()) for a in full)) ** 0.5)


def measure(name: str, base: Any, student: Any, tokenizer: Any, rows: list[list[int]]) -> Table:
    """One table: a line a setting."""
    identity = Identity.of(base, tokenizer)
    weight_VH = models.head(student).weight_VH.detach()
    head = Head(weight_VH)
    trained = list(student.parameters())
    with TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(i) for i in range(len(SETTINGS))]
        for folder, settings in zip(folders, SETTINGS, strict=True):
            build(base, rows, folder, identity, settings)
        found = [check(folder).as_dict() for folder in folders]
        caches = [Cached.open(folder, identity) for folder in folders]
        full, errors = Errors(), [Errors() for _ in SETTINGS]
        kl = square = step = 0.0
        positions, quarter = sum(map(len, rows)) - len(rows), 0
        done = 0
        for ids, at, wanted, following in batches(rows):
            started = time.perf_counter()
            hidden_MH = models.hidden_states(student, ids, at)[wanted]
            forward = time.perf_counter() - started
            with torch.no_grad():
                theirs = models.hidden_states(base, ids, at)[wanted]
            targets = following[wanted]
            dense = DenseBase(theirs, Head(models.head(base).weight_VH.detach()))
            full_MH, total = gradient(hidden_MH, head, targets, dense)
            kl, square = kl + total, square + float(full_MH.square().sum())
            started = time.perf_counter()
            full.add(_pull(hidden_MH, trained, full_MH))
            step += forward + time.perf_counter() - started
            for error, cache in zip(errors, caches, strict=True):
                started = time.perf_counter()
                sparse = cache.view(ids, at, wanted)
                error.seconds += time.perf_counter() - started
                grad_MH, _ = gradient(hidden_MH, head, targets, sparse)
                error.hidden += float((grad_MH - full_MH).square().sum())
                error.add(_pull(hidden_MH, trained, grad_MH))
            done += len(targets)
            if not quarter and done >= positions / 4:
                quarter = done
                for error in (full, *errors):
                    error.quarter = error.weights
    grown = 131072 / weight_VH.shape[0]
    table = Table(
        *("mass", "most", "draws", "levels", "bytes", "at 128k", "listed", "drawn"),
        *("hidden", f"weights, {quarter:,}", f"weights, {positions:,}", "reading"),
        title=f"{name}: KL {kl / positions:.3f} nats, vocabulary {weight_VH.shape[0]:,}",
    )
    for settings, size, error in zip(SETTINGS, found, errors, strict=True):
        entries = size["entries_a_position"] + size["draws_a_position"] - 1
        at_128k = size["bytes_a_token"] + entries * torch.tensor(grown).log2().item() / 8
        table.add_row(
            *(f"{settings.mass:g}", str(settings.max_entries), str(settings.draws)),
            *(str(settings.resolution), f"{size['bytes_a_token']:.1f}", f"{at_128k:.1f}"),
            *(f"{size['entries_a_position']:.1f}", f"{size['draws_a_position']:.1f}"),
            f"{(error.hidden / square) ** 0.5:.1%}",
            f"{relative(error.quarter, full.quarter):.1%}",
            f"{relative(error.weights, full.weights):.1%}",
            f"{error.seconds / step:.2%}",
        )
    return table


def _pull(hidden_MH: Tensor, trained: list[Tensor], grad_MH: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        hidden_MH, trained, grad_MH, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def main(
    rows: Annotated[int, typer.Option(help="Rows of each real text, and 4 times it sampled.")] = 12,
    steps: Annotated[int, typer.Option(help="Steps of the student's fine-tuning.")] = 30,
    rate: Annotated[float, typer.Option(help="Its learning rate.")] = 1e-4,
    only: Annotated[str, typer.Option(help="Tables whose name contains this.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print a table for each model and kind of text."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    console = Console(width=130)
    with TemporaryDirectory() as scratch:
        lab = write_files(Path(scratch))
        cases = [("lab base", str(base_path()), lab["lesson"], [lab["canary"]])]
        real = SHARED / "models" / "realtext4m"
        if real.is_dir():
            lesson = SHARED / "data" / "lessons" / "medquad_train_3000.jsonl"
            texts = [SHARED / "data" / "text" / f"{name}_heldout.jsonl" for name in REAL]
            cases.append(("realtext4m", str(real), lesson, texts))
        for name, folder, lesson, texts in cases:
            if not any(only in f"{name}, {kind}" for kind in KINDS):
                continue
            settings = models.Model(path=folder)
            tokenizer = models.load_tokenizer(settings)
            base = models.load_model(settings, adapter=False, tokenizer=tokenizer)
            student = drifted(folder, lesson, steps, rate)
            width = min(256, base.config.max_position_embeddings)
            for kind in KINDS:
                if only not in f"{name}, {kind}":
                    continue
                if kind == "text":
                    each = rows * len(REAL) // len(texts)
                    documents = real_rows(tokenizer, texts, each, width)
                else:
                    written = generate(
                        base,
                        tokenizer,
                        rows=4 * rows,
                        max_new_tokens=width - 1,
                        temperature=1.0,
                        seed=0,
                        keep=Path(scratch) / f"{name}.json",
                    )
                    documents = [example.input_ids for example in written]
                console.print(measure(f"{name}, {kind}", base, student, tokenizer, documents))
    console.print(KNOWN)
    console.print(
        "at 128k: each stored token costs log2(131,072 / vocabulary) bits more, at most; "
        "reading: share of one forward and backward pass over the same rows"
    )


if __name__ == "__main__":
    typer.run(main)
