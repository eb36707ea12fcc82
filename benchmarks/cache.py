"""Bytes a token of a cache against the error of the gradient that training takes from it.

A student is drifted for real (fine-tuned on a lesson until its KL to the base on the text is what
an anchored run has, and then what a loose one has), and the gradient of the forward KL to the base
is taken from the base itself and from caches of several settings:

    hidden  ||g_cache - g_full|| / ||g_full||, g the gradients with respect to the last hidden
            states, all positions stacked
    step    the same for the gradient with respect to all parameters (the head frozen), summed over
            the anchor tokens of one step, about 8k; root mean square over the steps there are
    run     the same, summed over all positions

beside the noise that the step has anyway, since it reads some texts and not others: the difference
of its halves over their sum. A list without draws errs in the same direction at every position, so
that summing does not help; with draws the error is noise, and falls as 1 / sqrt(positions).

`least` is the rate-distortion bound: the fewest bytes a position for a hidden gradient at 2 % and
5 %, were it Gaussian. To first order g = C dh, C the covariance of the head's rows under q, dh the
drift of the hidden state. With D the second moment of dh over positions, g has covariance C D C
with eigenvalues l_i: sum_i max(0, log2(l_i / level)) / 2 bits, at the level whose sum of
min(l_i, level) is the error allowed, over all positions. A code made before training does not know
where the student will go: it must serve any drift of that size, D = 1 |dh|^2 / H among them. Beside
it D as it was, which only a code that knew the student could use.

    python benchmarks/cache.py                # the lab's base, and ../shared/models/realtext4m
    python benchmarks/cache.py --only "realtext4m, text, drift 0.1"    # a part of the tables
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from holdfast.objective import Base, DenseBase, Head, SparseBase, token_losses
from holdfast.reference.build import build
from holdfast.reference.cache import Cached, Identity, check
from holdfast.reference.encoding import Settings

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = ("python", "docs", "stories_en", "physics_es", "textbooks")
SETTINGS = (
    Settings(draws=4),
    Settings(),
    Settings(draws=32, resolution=256),
    Settings(mass=0.99, draws=0, resolution=2048),
)
KNOWN = {50: 114, 128: 300}
"""Bytes a token of known stores of the k likeliest tokens; compared as exact, with a bucket."""
KINDS = ("text", "own samples")
DRIFTS = (0.015, 0.1)
"""Nats of KL to the base at least: under an anchor (the demo ends at about 0.01), and without."""
STEP = 8192
"""Anchor tokens of one step."""
BATCH = 4
"""Rows of one forward pass."""
AIMS = ((24, 0.02), (12, 0.05))
"""Bytes a token at most, and the gradient's relative error at most."""
READING = 0.03
BOUND_POSITIONS = 256


@dataclass(frozen=True)
class Case:
    """A base, what its student learns, and the texts on which they are compared."""

    name: str
    folder: str
    lesson: Path
    texts: list[Path]
    rate: float
    """The student's learning rate: some tens of steps to the larger drift."""


def drifted(
    case: Case, base: Any, tokenizer: Any, rows: list[list[int]], drifts: Sequence[float]
) -> Iterator[Any]:
    """The model after just so many steps on the lesson that its KL on the rows is each of these."""
    student = copy.deepcopy(base)
    width = min(256, student.config.max_position_embeddings)
    ids: list[int] = []
    for line in case.lesson.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids += tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"]
        if len(ids) > 200 * 8 * width:
            break
    optimizer = torch.optim.AdamW(student.parameters(), lr=case.rate)
    wanted = list(drifts)
    size, at = 8 * width, 0
    while wanted:
        batch = torch.tensor(ids[at : at + size]).view(8, width)
        student(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        at = (at + size) % (len(ids) - size)
        while wanted and _kl(base, student, rows[: 2 * BATCH]) >= wanted[0]:
            wanted.pop(0)
            yield student


def _kl(base: Any, student: Any, rows: list[list[int]]) -> float:
    total = count = 0.0
    with torch.no_grad():
        for ids, at, wanted, _ in batches(rows):
            p, q = (
                models.head(one)(models.hidden_states(one, ids, at)[wanted]).log_softmax(-1)
                for one in (base, student)
            )
            total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


def text_rows(tokenizer: Any, files: list[Path], rows: int, width: int) -> list[list[int]]:
    """The beginnings of documents, as many of each file, mixed."""
    start = [tokenizer.bos_token_id]
    found = []
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in islice(lines, rows):
                ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
                found.append(start + ids[: width - 1])
    random.Random(0).shuffle(found)
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


def likeliest(logp_MV: Tensor, targets_M: Tensor, k: int) -> SparseBase:
    """The k likeliest tokens and the next one, exact, and one bucket for the rest."""
    listed_MV = torch.zeros_like(logp_MV, dtype=torch.bool)
    listed_MV.scatter_(1, logp_MV.topk(k).indices, value=True)
    listed_MV.scatter_(1, targets_M.unsqueeze(1), value=True)
    tail_M = logp_MV.masked_fill(listed_MV, -torch.inf).logsumexp(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), listed_MV.sum(1).cumsum(0)])
    return SparseBase(offsets, listed_MV.nonzero()[:, 1], logp_MV[listed_MV], tail_M)


@dataclass
class Sums:
    """Gradients of the weights: of this step's two halves, and over all steps."""

    halves: list[list[Tensor]]
    run: list[Tensor]
    hidden: float = 0.0
    steps: float = 0.0
    """Sum of the squared norms of the steps' sums."""
    noise: float = 0.0
    """Sum of the squared norms of the differences of their halves."""
    seconds: float = 0.0

    @classmethod
    def over(cls, parameters: Sequence[Tensor]) -> Sums:
        halves = [[torch.zeros_like(one) for one in parameters] for _ in range(2)]
        return cls(halves, [torch.zeros_like(one) for one in parameters])

    def add(self, half: int, grads: Sequence[Tensor]) -> None:
        for total, grad in zip(self.halves[half], grads, strict=True):
            total += grad

    def end_step(self) -> None:
        for one, other, total in zip(*self.halves, self.run, strict=True):
            self.steps += float((one + other).double().square().sum())
            self.noise += float((one - other).double().square().sum())
            total += one + other
            one.zero_()
            other.zero_()

    @property
    def all(self) -> float:
        """Squared norm of the sum over all positions."""
        return sum(float(one.double().square().sum()) for one in self.run)


@dataclass
class Measured:
    """One table: the full gradient, and what each way of storing the base is off by."""

    positions: int
    steps: int
    full: Sums
    off: dict[int | Settings, Sums]
    kl: float = 0.0
    step_seconds: float = 0.0
    drift_NH: list[Tensor] = field(default_factory=list)
    share_NV: list[Tensor] = field(default_factory=list)


def gradient(hidden_MH: Tensor, head: Head, targets_M: Tensor, base: Base) -> tuple[Tensor, float]:
    """D sum KL / d hidden, and the sum."""
    hidden_MH = hidden_MH.detach().requires_grad_()
    every = torch.ones(len(hidden_MH), dtype=torch.bool)
    asked: dict[str, Any] = {"nll_N": ~every, "kl_N": every, "divergence": Divergence()}
    _, kl_M = token_losses(hidden_MH, head, targets_M, base=base, **asked)
    (grad_MH,) = torch.autograd.grad(kl_M.sum(), hidden_MH)
    return grad_MH, float(kl_M.detach().sum())


def measure(
    base: Any, student: Any, rows: list[list[int]], caches: dict[Settings, Cached]
) -> Measured:
    """Every way of storing the base, over all rows."""
    trained = list(student.parameters())
    head, base_head = (Head(models.head(one).weight_VH.detach()) for one in (student, base))
    ways: list[int | Settings] = [*KNOWN, *caches]
    off = {way: Sums.over(trained) for way in ways}
    positions, done = sum(map(len, rows)) - len(rows), 0
    steps = max(1, round(positions / STEP))
    found = Measured(positions, steps, Sums.over(trained), off)
    for number, (ids, at, wanted, following) in enumerate(batches(rows)):
        started = time.perf_counter()
        hidden_MH = models.hidden_states(student, ids, at)[wanted]
        forward = time.perf_counter() - started
        with torch.no_grad():
            theirs_MH = models.hidden_states(base, ids, at)[wanted]
            logp_MV = base_head(theirs_MH).log_softmax(-1)
        targets = following[wanted]
        full_MH, total = gradient(hidden_MH, head, targets, DenseBase(theirs_MH, base_head))
        found.kl += total / positions
        found.full.hidden += float(full_MH.square().sum())
        started = time.perf_counter()
        found.full.add(number % 2, _pull(hidden_MH, trained, full_MH))
        found.step_seconds += forward + time.perf_counter() - started
        found.drift_NH.append((hidden_MH - theirs_MH).detach())
        found.share_NV.append(head(hidden_MH.detach()[:16]).softmax(-1))
        for key, sums in off.items():
            started = time.perf_counter()
            if isinstance(key, int):
                sparse = likeliest(logp_MV, targets, key)
            else:
                sparse = caches[key].view(ids, at, wanted)
            sums.seconds += time.perf_counter() - started
            error_MH = gradient(hidden_MH, head, targets, sparse)[0] - full_MH
            sums.hidden += float(error_MH.square().sum())
            sums.add(number % 2, _pull(hidden_MH, trained, error_MH))
        before, done = done, done + len(targets)
        if done * steps // positions > before * steps // positions:
            for sums in (found.full, *off.values()):
                sums.end_step()
    return found


def _pull(hidden_MH: Tensor, trained: list[Tensor], grad_MH: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        hidden_MH, trained, grad_MH, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def powers(found: Measured, weight_VH: Tensor, known: bool) -> Tensor:
    """(N, H) eigenvalues of the covariances C D C of some positions; see the top."""
    drift_NH = torch.cat(found.drift_NH).double()
    moment_HH = drift_NH.T @ drift_NH / len(drift_NH)
    if not known:
        moment_HH = torch.eye(len(moment_HH)).double() * moment_HH.trace() / len(moment_HH)
    values, vectors_HH = torch.linalg.eigh(moment_HH)
    root_HH = vectors_HH * values.clamp_min(0).sqrt()
    share_NV = torch.cat(found.share_NV)
    share_NV = share_NV[:: max(1, len(share_NV) // BOUND_POSITIONS)].double()
    weight_VH = weight_VH.double()
    each = []
    for share_V in share_NV:
        mean_H = share_V @ weight_VH
        covariance_HH = weight_VH.T @ (share_V.unsqueeze(1) * weight_VH)
        covariance_HH -= torch.outer(mean_H, mean_H)
        each.append(torch.linalg.svdvals(covariance_HH @ root_HH).square())
    return torch.stack(each)


def least_bytes(power: Tensor, error: float) -> float:
    """Bytes a position at a relative error: reverse water-filling over all positions."""
    low, high = 0.0, float(power.max())
    for _ in range(60):
        level = (low + high) / 2
        if float(power.clamp(max=level).sum()) > error**2 * float(power.sum()):
            high = level
        else:
            low = level
    return float((power / low).log2().clamp_min(0).sum()) / 2 / 8 / len(power)


def table(name: str, vocabulary: int, found: Measured, sizes: dict[Settings, Any]) -> Table:
    """A line a way of storing."""
    grown = torch.tensor(131072 / vocabulary).log2().item() / 8
    shown = Table(
        *("mass", "most", "draws", "levels", "bytes", "at 128k", "listed", "drawn"),
        *(
            "hidden",
            f"step, {found.positions // found.steps:,}",
            f"run, {found.positions:,}",
            "reading",
        ),
        title=f"{name}: KL {found.kl:.3f} nats, vocabulary {vocabulary:,}; "
        f"the step's own noise {(found.full.noise / found.full.steps) ** 0.5:.0%}",
    )
    for key, sums in found.off.items():
        if isinstance(key, int):
            cells = ["", f"top {key}", "", "exact", f"({KNOWN[key]})", "", f"{key}", ""]
            reading = ""
        else:
            size = sizes[key]
            entries = size["entries_a_position"] + size["draws_a_position"] - 1
            cells = [f"{key.mass:g}", str(key.max_entries), str(key.draws), str(key.resolution)]
            cells += [f"{size['bytes_a_token']:.1f}"]
            cells += [f"{size['bytes_a_token'] + entries * grown:.1f}"]
            cells += [f"{size['entries_a_position']:.1f}", f"{size['draws_a_position']:.1f}"]
            reading = f"{sums.seconds / found.step_seconds:.2%}"
        shown.add_row(*cells, *(f"{error:.1%}" for error in errors(sums, found.full)), reading)
    return shown


def errors(sums: Sums, full: Sums) -> tuple[float, float, float]:
    """Relative errors: hidden, step, run."""
    pairs = ((sums.hidden, full.hidden), (sums.steps, full.steps), (sums.all, full.all))
    hidden, step, run = ((off / whole) ** 0.5 for off, whole in pairs)
    return hidden, step, run


def verdicts(name: str, found: Measured, sizes: dict[Settings, Any]) -> Iterator[str]:
    """Each aim, and the best that was reached within its bytes."""
    for most, aim in AIMS:
        within = [
            (errors(sums, found.full), sizes[key]["bytes_a_token"])
            for key, sums in found.off.items()
            if not isinstance(key, int) and sizes[key]["bytes_a_token"] <= most
        ]
        for i, what in enumerate(("hidden", "step", "run")):
            reached = "nothing is that small"
            met = False
            if within:
                best, size = min((each[i], size) for each, size in within)
                reached, met = f"{best:.1%} at {size:.1f}", best <= aim
            yield (
                f"{name}, KL {found.kl:.3f}: at most {aim:.0%} at {most} bytes, {what}: {reached}: "
                f"{'met' if met else 'MISSED'}"
            )
    slow = max(s.seconds for key, s in found.off.items() if not isinstance(key, int))
    share = slow / found.step_seconds
    yield (
        f"{name}, KL {found.kl:.3f}: reading under {READING:.0%} of a step: at most {share:.2%}: "
        f"{'met' if share < READING else 'MISSED'}"
    )


def main(
    rows: Annotated[int, typer.Option(help="Rows of each real text; twice as many sampled.")] = 12,
    only: Annotated[str, typer.Option(help="Tables whose name contains this.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print two tables for each model and kind of text, then the aims."""
    torch.set_num_threads(threads)
    console = Console(width=130, soft_wrap=True)
    said: list[str] = []
    with TemporaryDirectory() as scratch:
        lab = write_files(Path(scratch))
        cases = [Case("lab base", str(base_path()), lab["lesson"], [lab["canary"]], 2e-3)]
        real = SHARED / "models" / "realtext4m"
        if real.is_dir():
            lesson = SHARED / "data" / "lessons" / "medquad_train_3000.jsonl"
            texts = [SHARED / "data" / "text" / f"{name}_heldout.jsonl" for name in REAL]
            cases.append(Case("realtext4m", str(real), lesson, texts, 1e-4))
        for case in cases:
            for kind in KINDS:
                name = f"{case.name}, {kind}"
                drifts = [drift for drift in DRIFTS if only in f"{name}, drift {drift}"]
                if not drifts:
                    continue
                torch.manual_seed(0)
                settings = models.Model(path=case.folder)
                tokenizer = models.load_tokenizer(settings)
                base = models.load_model(settings, adapter=False, tokenizer=tokenizer)
                width = min(256, base.config.max_position_embeddings)
                if kind == "text":
                    each = rows * len(REAL) // len(case.texts)
                    documents = text_rows(tokenizer, case.texts, each, width)
                else:
                    kept = Path(scratch) / f"{case.name}.json"
                    asked = {"rows": 2 * rows, "max_new_tokens": width - 1, "temperature": 1.0}
                    written = generate(base, tokenizer, **asked, seed=0, keep=kept)
                    documents = [example.input_ids for example in written]
                identity = Identity.of(base, tokenizer)
                folders = {one: Path(scratch) / name / str(i) for i, one in enumerate(SETTINGS)}
                for one, folder in folders.items():
                    build(base, documents, folder, identity, one)
                sizes = {one: check(folder).as_dict() for one, folder in folders.items()}
                caches = {one: Cached.open(folder, identity) for one, folder in folders.items()}
                for student in drifted(case, base, tokenizer, documents, drifts):
                    found = measure(base, student, documents, caches)
                    vocabulary = len(models.head(base).weight_VH)
                    console.print(table(name, vocabulary, found, sizes))
                    head = models.head(student).weight_VH.detach()
                    for known in (False, True):
                        power = powers(found, head, known)
                        least = [f"{least_bytes(power, e):.0f} bytes at {e:.0%}" for _, e in AIMS]
                        console.print(
                            f"least for the hidden gradient, {'this' if known else 'any'} drift of "
                            f"that size: {', '.join(least)}"
                        )
                    console.print()
                    said += verdicts(name, found, sizes)
    console.print(
        "top k: known stores, exact here; their bytes as published. at 128k: each stored token "
        "costs log2(131,072 / vocabulary) bits more, at most. reading: share of one forward and "
        "backward pass over the same rows\n"
    )
    for line in said:
        console.print(line)


if __name__ == "__main__":
    typer.run(main)
