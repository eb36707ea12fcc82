"""Seconds a step and peak memory: no anchor, a live, cached or remembered one, written plainly.

    python benchmarks/step.py                     # the lab's base, then ../shared's, where it is
    python benchmarks/step.py --model PATH --text FILE.jsonl
    python benchmarks/step.py --models realtext4m --tunings full     # a part of it

All cases take turns, step by step, within one process, over the same rows of real text, so that
whatever else the machine does falls on all of them. Anchored are a quarter of the rows (beside
three quarters lesson), or every target token of a batch that is all lesson; each case is compared
with the same rows without an anchor. `plain` is the obvious way to write it: two full tensors of
logits. On a CPU seconds are those of CPU time: with one thread what the clock would show if nothing
else ran. Where the time of a step goes is read inside it. Peak memory is that of a process of its
own, above what it held before the model was loaded; freed buffers go back to the system at once
there, or what the allocators (glibc's, Arrow's) hold for later would be counted by chance. Whole
trainers beside trl's: step_time.py.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from unittest.mock import patch

import psutil
import pyarrow.parquet  # noqa: F401  (a run's rows lie in Arrow: each case of a run has it)
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from holdfast import model as models
from holdfast import objective
from holdfast.data.example import Role
from holdfast.data.packing import MicroBatch, PackedRow, collate
from holdfast.lab import base_path, write_files
from holdfast.levers import StepState, Term, TokenLosses
from holdfast.levers.adapter import Adapter
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.model import Model, load_model, load_tokenizer
from holdfast.reference.adapter_off import AdapterOff
from holdfast.reference.build import build
from holdfast.reference.cache import Cached, Identity
from holdfast.reference.encoding import Settings
from holdfast.reference.frozen import Frozen
from holdfast.reference.remembered import Remembered
from holdfast.step import loss_terms, token_losses

SHARED = Path(__file__).resolve().parents[2] / "shared"
BATCHES = 8
WARM_UP = 3
QUARTER = {
    "rows, no anchor": None,
    "25 % live": "live",
    "25 % cached": "cached",
    "25 % remembered": "remembered",
    "25 % plain": "plain",
}
ALL = {
    "lesson, no anchor": None,
    "all live": "live",
    "all cached": "cached",
    "all remembered": "remembered",
    "all plain": "plain",
}
PARTS = ("forward", "base", "head", "backward", "optimizer")
FREED_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
"""See the top."""
TUNINGS = {"lora": "LoRA on the MLP", "full": "full fine-tuning"}
CACHED, MEMORY = 1.03, 1.05
ONE_PASS_MORE = {"lora": 1.5, "full": 1.33}
"""A forward pass beside forward and backward: a third, or half where no weight has a gradient."""


class Parts:
    """Seconds spent in each part of a step, what it calls under another name not counted."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[float] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count this block under `name`."""
        synchronize()
        started = clock()
        self._inside.append(0.0)
        yield
        synchronize()
        took = clock() - started
        self.seconds[name] += took - self._inside.pop()
        if self._inside:
            self._inside[-1] += took

    def counting(self, name: str, function: Any) -> Any:
        """The function, counted under `name`."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return function(*args, **kwargs)

        return counted


def clock() -> float:
    """Seconds: on a CPU those that it spent on this process, whatever else the machine does."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Case:
    """A model of its own that is trained with one kind of anchor."""

    def __init__(
        self, name: str, path: str, full: bool, rows: list[list[int]], rows_a_step: int, cache: Path
    ) -> None:
        self.name, self.kind = name, (QUARTER | ALL)[name]
        settings = Model(path=path)
        self.tokenizer = load_tokenizer(settings)
        set_seed(0)
        base = load_model(settings, adapter=not full, tokenizer=self.tokenizer).to(device())
        cached = None
        if self.kind == "cached":
            cached = Cached.open(cache, Identity.of(base, self.tokenizer))
        self.model: Any = Adapter(method="none" if full else "lora").wrap(base).train()
        live = Frozen.copy_of if full else AdapterOff
        if self.kind == "remembered":
            self.reference: Any = Remembered.of(self.model, rows)
        else:
            self.reference = cached or (live(self.model) if self.kind else None)
        on_lesson = name in ALL
        self.lever = KlAnchor(
            weight=10.0 if self.kind else 0.0, on="task" if on_lesson else "anchor"
        )
        roles = [
            Role.ANCHOR if not on_lesson and row % 4 == 3 else Role.TASK
            for row in range(rows_a_step)
        ]
        self.batches = itertools.cycle(
            [
                batch_of(rows[first : first + rows_a_step], roles)
                for first in range(0, BATCHES * rows_a_step, rows_a_step)
            ]
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(self) -> dict[str, float]:
        """One optimizer step; seconds in each part, and of the whole."""
        parts, batch = Parts(), next(self.batches)
        synchronize()
        started = clock()
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
            loss = (self._plain if self.kind == "plain" else self._ours)(batch, parts)
        with parts.of("backward"):
            loss.backward()
        with parts.of("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        return {**parts.seconds, "step": clock() - started}

    def _ours(self, batch: MicroBatch, parts: Parts) -> torch.Tensor:
        totals = {role: int((batch["roles"] == role).sum()) for role in Role}
        memory: dict[str, Any] = {"kl_anchor": {}}

        def terms_of(out: TokenLosses) -> dict[str, Term]:
            return loss_terms(out, StepState(0, totals, 1), [self.lever], memory)

        counted = patch.object(
            models, "hidden_states", parts.counting("forward", models.hidden_states)
        )
        head = patch.object(
            objective, "token_losses", parts.counting("head", objective.token_losses)
        )
        with counted, head:
            reference = self.reference and Looked(self.reference, parts)
            out = token_losses(self.model, batch, self.lever.kl_roles(), reference, terms=terms_of)
        terms = terms_of(out)
        return sum(term.weight * term.sum / term.count for term in terms.values())  # type: ignore[return-value]

    def _plain(self, batch: MicroBatch, parts: Parts) -> torch.Tensor:
        """Both models' logits whole, and torch's own losses."""
        ids = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        with parts.of("forward"):
            logits = self.model(**ids, use_cache=False).logits
        with parts.of("base"), torch.no_grad():
            if isinstance(self.reference, AdapterOff):
                with self.model.disable_adapter():
                    base = self.model(**ids, use_cache=False).logits
            else:
                base = self.reference.model(**ids, use_cache=False).logits
        with parts.of("head"):
            task = batch["roles"] == Role.TASK
            anchored = torch.zeros_like(task)
            for role in self.lever.kl_roles():
                anchored |= batch["roles"] == role
            logq, logp = (t.float().log_softmax(-1) for t in (logits, base))
            nll = torch.nn.functional.nll_loss(logq[task], batch["targets"][task])
            kl = torch.nn.functional.kl_div(
                logq[anchored], logp[anchored], reduction="batchmean", log_target=True
            )
            return nll + self.lever.weight * kl


class Looked:
    """A reference whose time is counted."""

    def __init__(self, reference: Any, parts: Parts) -> None:
        self.reference, self.parts = reference, parts

    def view(self, *args: Any) -> Any:
        with self.parts.of("base"), patch.object(models, "hidden_states", PLAIN_HIDDEN_STATES):
            return self.reference.view(*args)


PLAIN_HIDDEN_STATES = models.hidden_states


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def batch_of(rows: list[list[int]], roles: list[Role]) -> Any:
    """Rows of equal length, one document each."""
    packed = [
        [PackedRow(row, [False] + [True] * (len(row) - 1), role)]
        for row, role in zip(rows, roles, strict=True)
    ]
    return {name: t.to(device()) for name, t in collate(packed, pad_token_id=0).items()}  # type: ignore[attr-defined]


def rows_of_text(path: str, text: Path, count: int, length: int) -> list[list[int]]:
    """`count` rows of `length` tokens of the text, each with another beginning."""
    tokenizer = load_tokenizer(Model(path=path))
    stream: list[int] = []
    lines = text.read_text(encoding="utf-8").splitlines()
    for line in itertools.cycle(lines):
        if len(stream) >= count * length:
            break
        stream += tokenizer(json.loads(line)["text"])["input_ids"]
    return [stream[i * length : (i + 1) * length] for i in range(count)]


def compare(
    path: str, full: bool, rows: list[list[int]], rows_a_step: int, cache: Path, steps: int
) -> dict[str, dict[str, float]]:
    """Medians of each case's parts, the cases taking turns."""
    found: dict[str, list[dict[str, float]]] = {}
    for group in (QUARTER, ALL):
        cases = [Case(name, path, full, rows, rows_a_step, cache) for name in group]
        for turn in range(WARM_UP + steps):
            for case in cases if turn % 2 else cases[::-1]:
                taken = case.step()
                if turn >= WARM_UP:
                    found.setdefault(case.name, []).append(taken)
    return {
        name: {
            part: statistics.median(t.get(part, 0.0) for t in taken) for part in (*PARTS, "step")
        }
        for name, taken in found.items()
    }


def peak(case: str, path: str, full: bool, rows_file: Path, rows_a_step: int, cache: Path) -> float:
    """MiB at the peak of three steps in a process of its own, above what it held before."""
    words = [sys.executable, __file__, "--peak-of", case, "--model", path, "--cache", str(cache)]
    words += [
        "--rows-file",
        str(rows_file),
        "--rows-a-step",
        str(rows_a_step),
        "--threads",
        str(torch.get_num_threads()),
        *(["--full"] * full),
    ]
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, env=os.environ | FREED_AT_ONCE
    )
    return float(done.stdout.split()[-1])


def print_peak(
    case: str, path: str, full: bool, rows_file: Path, rows_a_step: int, cache: Path
) -> None:
    """What `peak` reads."""
    rows = json.loads(rows_file.read_text())
    if torch.cuda.is_available():
        one = Case(case, path, full, rows, rows_a_step, cache)
        for _ in range(3):
            one.step()
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    before = psutil.Process().memory_info().rss
    one = Case(case, path, full, rows, rows_a_step, cache)
    for _ in range(3):
        one.step()
    status = Path("/proc/self/status").read_text()  # the kernel's own high-water mark, in KiB
    highest = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print((highest - before) / 2**20)


def show(tuning: str, found: dict[str, dict[str, float]], peaks: dict[str, float]) -> None:
    """Seconds, where they go, both ratios to the same rows without an anchor, and the aims."""
    table = Table("case", "s a step", *PARTS, "x", "peak MiB", "x", title=TUNINGS[tuning])
    aims = []
    for group in (QUARTER, ALL):
        first = next(iter(group))
        for name, kind in group.items():
            cells = [f"{found[name][part]:.3f}" for part in ("step", *PARTS)]
            ratio = found[name]["step"] / found[first]["step"]
            cells.append(f"{ratio:.2f}")
            if kind in ("cached", "remembered"):
                aims.append((f"{name}, time", ratio, CACHED))
            if name == "all live":
                aims.append((f"{name}, time", ratio, ONE_PASS_MORE[tuning]))
            if peaks:
                held = peaks[name] / peaks[first]
                cells += [f"{peaks[name]:.0f}", f"{held:.2f}"]
                if kind in ("cached", "remembered", "live"):
                    aims.append((f"{name}, peak memory", held, MEMORY))
            table.add_row(name, *cells)
        table.add_section()
    Console(width=140).print(table)
    for what, ratio, most in aims:
        verdict = "met" if ratio <= most else "MISSED"
        print(f"{TUNINGS[tuning]:18} {what:24} {ratio:6.3f}  aim {most:.2f}  {verdict}")
    more, one = found["all live"], found["lesson, no anchor"]
    parts = ", ".join(f"{part} {more[part] - one[part]:+.3f}" for part in PARTS)
    print(f"{TUNINGS[tuning]:18} all live: {more['step'] - one['step']:+.3f} s a step: {parts}")


def measure(
    path: str,
    text: Path,
    tunings: list[str],
    rows_a_step: int,
    length: int,
    steps: int,
    memory: bool,
) -> None:
    """Every table for one model."""
    rows = rows_of_text(path, text, BATCHES * rows_a_step, length)
    size = f"{rows_a_step} rows x {length} tokens a step"
    where = f"{torch.get_num_threads()} threads, {device()}, median of {steps} rounds"
    kind = "seconds" if torch.cuda.is_available() else "seconds of CPU time"
    print(f"model {Path(path).name}, text {text.name}, {size}, {where}, {kind}", flush=True)
    with TemporaryDirectory() as scratch:
        rows_file = Path(scratch) / "rows.json"
        rows_file.write_text(json.dumps(rows))
        settings = Model(path=path)
        tokenizer = load_tokenizer(settings)
        for tuning in tunings:
            full, cache = tuning == "full", Path(scratch) / f"cache-{tuning}"
            base = load_model(settings, adapter=not full, tokenizer=tokenizer).to(device())
            build(base, rows, cache, Identity.of(base, tokenizer), Settings())
            del base
            found = compare(path, full, rows, rows_a_step, cache, steps)
            given = (path, full, rows_file, rows_a_step, cache)
            peaks = {name: peak(name, *given) for name in found} if memory else {}
            show(tuning, found, peaks)


def main(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; empty: --models")] = None,
    text: Annotated[Path | None, typer.Option(help="JSONL with text; needed with --model")] = None,
    models: Annotated[str, typer.Option(help="Of lab and realtext4m")] = "lab,realtext4m",
    tunings: Annotated[str, typer.Option(help="Of lora and full")] = "lora,full",
    rows_a_step: int = 16,
    length: int = 256,
    steps: int = 12,
    threads: int = 2,
    memory: bool = True,
    peak_of: Annotated[str | None, typer.Option(hidden=True)] = None,
    full: Annotated[bool, typer.Option("--full", hidden=True)] = False,
    rows_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
    cache: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the tables of each model."""
    torch.set_num_threads(threads)
    if peak_of and model and rows_file and cache:
        print_peak(peak_of, model, full, rows_file, rows_a_step, cache)
        return
    if model and not text:
        raise typer.BadParameter("--model needs --text, a .jsonl file of text of its kind")
    options = (tunings.split(","), rows_a_step, length, steps, memory)
    with TemporaryDirectory() as scratch:
        if model and text:
            measure(model, text, *options)
            return
        if "lab" in models:
            measure(str(base_path()), write_files(Path(scratch))["replay"], *options)
        real = SHARED / "models" / "realtext4m"
        if "realtext4m" in models and real.is_dir():
            measure(str(real), SHARED / "data" / "text" / "docs_train.jsonl", *options)


if __name__ == "__main__":
    typer.run(main)
