"""The Fisher of the lab's base: time against a loop over rows, memory, diagonal and factored.

Two loops, each one forward and one backward pass a row: `usual` as it is mostly written, with
`zero_grad` and the square of every `.grad`, and `lean`, which takes the gradients from autograd and
adds the squares in place. They take turns with ours within one process, so that whatever else the
machine does falls on all. All are given the same rows and labels and must agree to 1e-5.

On a CPU all do the same multiplications: 2 a weight and token forward, 2 back to the activations
and 2 for the gradient of each row, which a diagonal cannot be had without. So batching saves what a
short row wastes, and no more; a GPU is where one row leaves most of the device idle. `passes` has
the first two of the three alone, in batches and without any Fisher: 3/2 of its time is what the
multiplications cost, and `bound` what that leaves to be gained over the lean loop.

    python benchmarks/fisher.py
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import typer
from torch import Tensor, nn

from holdfast.data.example import Example
from holdfast.displacement import moved
from holdfast.fisher import BATCH_TOKENS, Factored, Importance, fisher, size
from holdfast.lab import base_path, write_files
from holdfast.levers.adapter import Adapter
from holdfast.model import Model, load_model, load_tokenizer

AIM = 8.0
AGREE = 1e-5


def base() -> tuple[Any, Any]:
    """The lab's base and its tokenizer, on the accelerator if there is one."""
    settings = Model(path=str(base_path()), dtype="float32")
    tokenizer = load_tokenizer(settings)
    model = load_model(settings, adapter=False, tokenizer=tokenizer).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def texts(tokenizer: Any, name: str, count: int) -> list[Example]:
    """Rows of one of the lab's files: prompt and completion of the lesson, or plain text."""
    from holdfast.data.chat import encode
    from holdfast.data.rows import Source, iter_rows

    with TemporaryDirectory() as scratch:
        file = write_files(Path(scratch))[name]
        rows = list(iter_rows(Source(path=str(file), limit=count)))
    return [one for row in rows for one in encode(row, tokenizer, max_length=256)]


def noise(length: int, count: int) -> list[Example]:
    """Rows of random tokens; time does not depend on what they say."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(4, 2000, (count, length), generator=generator).tolist()
    return [Example(row, [False] + [True] * (length - 1)) for row in ids]


def looped(model: Any, rows: Sequence[Example], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One forward and one backward pass a row."""
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    positions = 0
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        learned = torch.tensor(row.loss_mask[1:], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        targets = ids[0, 1:].masked_fill(~learned, -100)
        nll = nn.functional.cross_entropy(logits, targets, reduction="sum")
        grads = torch.autograd.grad(nll, list(weights.values()))
        for total, grad in zip(found.values(), grads, strict=True):
            total.addcmul_(grad, grad)
        positions += sum(row.loss_mask[1:])
    return {name: total.div_(positions) for name, total in found.items()}


def usual(model: Any, rows: Sequence[Example], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same as it is mostly written."""
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    positions = 0
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        learned = torch.tensor([row.loss_mask], device=model.device)
        count = sum(row.loss_mask[1:])
        model.zero_grad()
        out = model(input_ids=ids, labels=ids.masked_fill(~learned, -100), use_cache=False)
        (out.loss * count).backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            found[name] += weight.grad**2
        positions += count
    model.zero_grad()
    return {name: total / positions for name, total in found.items()}


def passes(model: Any, rows: Sequence[Example], weights: Mapping[str, Any]) -> None:
    """Forward and backward in batches as large as ours, to the activations and to no weight."""
    model.requires_grad_(False)
    left = sorted((row.input_ids for row in rows), key=len)
    while left:
        width = len(left[-1])
        batch, left = left[-max(1, BATCH_TOKENS // width) :], left[: -max(1, BATCH_TOKENS // width)]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=model.device)
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        logits.backward(torch.ones_like(logits))
    only(weights, model)


def only(weights: Mapping[str, nn.Parameter], model: Any) -> None:
    """Train nothing else, so that the loop computes no gradient it does not need."""
    chosen = {id(weight) for weight in weights.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def agree(name: str, model: Any, rows: list[Example], names: list[str]) -> None:
    """Leave with an error where ours or the usual loop differs from the lean one, in float64.

    In fp32 all three are off by up to 1e-5 from that on random tokens, each by its own rounding.
    """
    exact = deepcopy(model).double()
    weights = {weight: exact.get_parameter(weight) for weight in names}
    expected = looped(exact, rows, weights)
    for found in (fisher(exact, rows, weights, labels="empirical"), usual(exact, rows, weights)):
        worst = max(float((found[n] - f).norm() / f.norm()) for n, f in expected.items())
        if worst > AGREE:
            raise SystemExit(f"{name}: differs from the loop by {worst:.1e}, more than {AGREE:.0e}")


def race(name: str, model: Any, rows: list[Example], weights: Any, rounds: int) -> float:
    """A line of the table; returns the ratio of the medians."""
    only(weights, model)
    agree(name, model, rows[:16], list(weights))
    times: dict[str, list[float]] = {k: [] for k in ("usual", "lean", "diagonal", "factored")}
    times["passes"] = []
    for _ in range(rounds):
        times["usual"].append(seconds(lambda: usual(model, rows, weights)))
        times["lean"].append(seconds(lambda: looped(model, rows, weights)))
        times["passes"].append(seconds(lambda: passes(model, rows, weights)))
        for kind in ("diagonal", "factored"):
            run: dict[str, Any] = {"labels": "empirical", "factored": kind == "factored"}
            times[kind].append(seconds(lambda run=run: fisher(model, rows, weights, **run)))
    took = {way: statistics.median(found) for way, found in times.items()}
    tokens = sum(len(row.input_ids) for row in rows) / len(rows)
    speeds = " ".join(f"{1e3 * took[way] / len(rows):8.2f}" for way in took)
    ratios = (
        took["usual"] / took["diagonal"],
        took["lean"] / took["diagonal"],
        took["usual"] / took["factored"],
        took["lean"] / (1.5 * took["passes"]),
    )
    print(f"{name:22} {tokens:6.1f}  {speeds}  " + " ".join(f"{ratio:7.2f}" for ratio in ratios))
    return ratios[0]


def peak(kind: str) -> int:
    """Bytes by which one way raises the memory in use, in a process of its own."""
    model, tokenizer = base()
    rows, weights = texts(tokenizer, "replay", 64), dict(model.named_parameters())
    cuda = torch.cuda.is_available()
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = torch.cuda.memory_allocated() if cuda else _status("VmRSS")
    if kind == "loop":
        looped(model, rows, weights)
    else:
        fisher(model, rows, weights, labels="empirical", factored=kind == "factored")
    return (torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")) - before


def _status(field: str) -> int:
    """Bytes that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def agreement(adapter: bool, steps: int) -> None:
    """Penalty and its gradient under the two Fishers, at what a real training has moved by."""
    model, tokenizer = base()
    if adapter:
        torch.manual_seed(0)
        model = Adapter(r=16).wrap(model)
    else:
        model.requires_grad_(True)
    changes = moved(model, "benchmark")
    weights = {name: change.weight for name, change in changes.items()}
    rows = texts(tokenizer, "replay", 256)
    diagonal, factored = (fisher(model, rows, weights, factored=kind) for kind in (False, True))
    trained = [p for p in model.parameters() if p.requires_grad]
    learn(model, texts(tokenizer, "lesson", 256), trained, 2e-3 if adapter else 1e-4, steps)
    parts = {
        kind: torch.stack([change.quadratic(found[name]) for name, change in changes.items()])
        for kind, found in (("diagonal", diagonal), ("factored", factored))
    }
    full, short = (part.detach() for part in parts.values())
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(part.sum(), trained)])
        for part in parts.values()
    ]
    cosine = float(nn.functional.cosine_similarity(*gradients, dim=0))
    ratio = float(gradients[1].norm() / gradients[0].norm())
    elements = [pair for name in weights for pair in _pairs(diagonal[name], factored[name])]
    by_element = statistics.fmean(elements)
    by_matrix = float(torch.corrcoef(torch.stack([full, short]))[0, 1])
    print(
        f"{'LoRA on the MLP' if adapter else 'full fine-tuning':18} {steps} steps  "
        f"1/2 d'Fd {0.5 * float(full.sum()):.4f} diagonal, {0.5 * float(short.sum()):.4f} factored "
        f"({float(short.sum() / full.sum()) - 1:+.1%})\n"
        f"{'':18} correlation over matrices {by_matrix:.3f}, over the weights of a matrix "
        f"{by_element:.3f} (mean); gradient: cosine {cosine:.3f}, length x {ratio:.2f}"
    )
    held, whole = size(factored), sum(p.numel() * p.element_size() for p in weights.values())
    print(
        f"{'':18} factored {held} bytes, {held / whole:.2%} of the {whole} bytes of its weights; "
        f"diagonal {size(diagonal)}"
    )
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    if held > 0.01 * everything:
        raise SystemExit("the factored Fisher is over 1 % of the model")


def _pairs(whole: Importance, parts: Importance) -> list[float]:
    """Correlation of F's elements; none for what has one dimension, which is the same in both."""
    if not isinstance(parts, Factored) or not isinstance(whole, Tensor):
        return []
    both = torch.stack([whole.flatten(), parts.dense().flatten()])
    return [float(torch.corrcoef(both)[0, 1])]


def learn(model: Any, rows: list[Example], trained: list[Tensor], rate: float, steps: int) -> None:
    """AdamW on the lesson, eight rows a step."""
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for step in range(steps):
        chosen = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        width = max(len(row.input_ids) for row in chosen)
        ids = torch.zeros(8, width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for b, row in enumerate(chosen):
            n = len(row.input_ids)
            ids[b, :n] = torch.tensor(row.input_ids)
            labels[b, :n] = ids[b, :n].masked_fill(~torch.tensor(row.loss_mask), -100)
        ids, labels = ids.to(model.device), labels.to(model.device)
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(rounds: int = 3, threads: int = 1, steps: int = 60) -> None:
    """Print the three tables; leave with an error where ours and the loop differ."""
    torch.set_num_threads(threads)
    model, tokenizer = base()
    everything = dict(model.named_parameters())
    mlp = {name: weight for name, weight in everything.items() if ".mlp." in name}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} threads"
    print(f"lab base, {sum(p.numel() for p in everything.values())} weights, fp32, {where}\n")
    ways = " ".join(f"{way:>8}" for way in ("usual", "lean", "diagonal", "factored", "passes"))
    print(
        f"{'rows, weights':22} {'tokens':>6}  {'milliseconds a row':>44}  {'ratios':>23}   bound"
        f"\n{'':22} {'a row':>6}  {ways}  {'us./d.':>7} {'lean/d.':>7} {'us./f.':>7} {'lean':>7}"
    )
    race("warm-up", model, noise(8, 16), mlp, 1)
    found = [
        race("lab's own text, all", model, texts(tokenizer, "replay", 48), everything, rounds),
        race("lab's own text, MLP", model, texts(tokenizer, "replay", 48), mlp, rounds),
        race("lesson, all", model, texts(tokenizer, "lesson", 64), everything, rounds),
    ]
    for length in (4, 8, 16, 32, 128):
        count = max(32, 1024 // length) if length < 128 else 16
        found.append(race("random, all", model, noise(length, count), everything, rounds))
    reached = sum(ratio >= AIM for ratio in found)
    print(f"aim: {AIM:g} times the usual loop; reached on {reached} of {len(found)}")
    print("\nmemory above the model's, 64 of the lab's texts, all weights")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for kind in ("loop", "diagonal", "factored"):
            print(f"{kind:10} {pool.apply(peak, (kind,)) / 2**20:7.1f} MiB")
    print("\ndiagonal against factored, F over 256 of the lab's texts, lesson learned by AdamW")
    for adapter in (False, True):
        agreement(adapter, steps)


if __name__ == "__main__":
    typer.run(main)
