"""The objective beside what others do: seconds and peak memory of forward + backward.

All from last hidden states and a head; the gradient goes to the hidden states (head frozen) or to
both (head trained). Every position has an NLL and, where there is a KL, every position has that
too. "1 in 4" is the step as `kl_anchor` has it by default: a KL at one position in four, an NLL at
the others, the base's logits only where needed. Ours is told in forward what the losses weigh, as
the trainer tells it; "untold" is without, as for a lever whose weights hang on the losses.

    materialised NLL         cross_entropy on the full logits
    materialised NLL + KL    and kl_div to a base, with both full logit tensors
    trl NLL                  trl's own function behind `SFTTrainer` (ChunkedLogProbFunction)
    liger NLL, liger JSD     Liger's fused linear losses, where they run (a GPU)
    ours                     NLL; with KL to a sparse base of `--entries` listed; to a dense base
    products alone           the matrix products of NLL + dense KL, in our chunks, and nothing else:
                             logits of both sides, the way back to the hidden states and, where it
                             is trained, to the head. Both ways do them, so no way is below that

Each timed call is one of a round: all ways in turn, each round in the opposite order of the last,
so that whatever else the machine does falls on all; the median of the rounds counts.

Peak memory is what torch's allocator holds above the inputs at the worst moment of a call: on CUDA
`max_memory_allocated`, on a CPU the running sum of the profiler's allocations and frees.

    python benchmarks/objective.py                                  # the grid, on a CPU
    python benchmarks/objective.py --sizes 576x128000x2048          # H x V x N, comma-separated
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.profiler import profile
from trl.kernels import ChunkedLogProbFunction

from holdfast.chunks import chunk_rows
from holdfast.divergence import Divergence
from holdfast.objective import Base, DenseBase, Head, SparseBase, token_losses

SIZES = "576x128256x1024,1024x32000x1024,288x49152x1024,288x32000x8192"
TRAINED_SIZES = "576x49152x512"
TRL_COLUMNS = 32768
"""What trl's `add_fused_lm_head` gives (`_CHUNKED_LOGPROB_CHUNK_SIZE`)."""
NLL, BOTH, TRL = "materialised NLL", "materialised NLL + KL", "trl NLL"
LIGER_NLL, LIGER_JSD = "liger NLL", "liger JSD"
OURS, SPARSE, DENSE = "ours NLL", "ours NLL + sparse KL", "ours NLL + dense KL"
BOTH_4, DENSE_4 = f"{BOTH}, 1 in 4", f"{DENSE}, 1 in 4"
UNTOLD = f"{DENSE}, untold"
PRODUCTS = "products alone"
PRODUCTS_4 = f"{PRODUCTS}, 1 in 4"

Way = Callable[[], None]


@dataclass
class Case:
    """Inputs of one size."""

    hidden: Tensor
    base_hidden: Tensor
    weight: Tensor
    targets: Tensor

    @classmethod
    def random(cls, h: int, v: int, n: int, device: torch.device, trained: bool) -> Case:
        """Logits of the spread of a trained model's; a base that is a little away."""
        random = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        hidden = torch.randn(n, h, generator=random)
        moved = hidden + 0.1 * torch.randn(n, h, generator=random)
        weight = 3 * torch.randn(v, h, generator=random) / h**0.5
        targets = torch.randint(v, (n,), generator=random)
        hidden, moved, weight = (x.to(device, dtype) for x in (hidden, moved, weight))
        return cls(
            hidden.requires_grad_(), moved, weight.requires_grad_(trained), targets.to(device)
        )

    def sparse_base(self, entries: int) -> SparseBase:
        """The likeliest tokens of the base at each position, and the target."""
        offsets, ids, logp, log_tail = [0], [], [], []
        for rows in torch.arange(len(self.targets)).split(64):
            hidden, targets = self.base_hidden[rows], self.targets[rows]
            full = (hidden @ self.weight.detach().T).float().log_softmax(1)
            listed = full.topk(entries, dim=1).indices
            listed[~(listed == targets[:, None]).any(1), -1] = targets[
                ~(listed == targets[:, None]).any(1)
            ]
            ids.append(listed.flatten())
            logp.append(full.gather(1, listed).flatten())
            log_tail.append(full.scatter(1, listed, -torch.inf).logsumexp(1))
            offsets += [offsets[-1] + entries * (i + 1) for i in range(len(rows))]
        device = self.hidden.device
        return SparseBase(
            torch.tensor(offsets, device=device),
            torch.cat(ids),
            torch.cat(logp),
            torch.cat(log_tail),
        )


def ways(case: Case, entries: int) -> dict[str, Way]:
    """Each way's forward + backward; the sum over positions is the loss."""
    every = torch.ones_like(case.targets, dtype=torch.bool)
    fourth = torch.arange(len(every), device=every.device) % 4 == 0
    frozen = case.weight.detach()

    def materialised(nll: Tensor, kl: Tensor | None) -> None:
        logits = (case.hidden @ case.weight.T).float()
        loss = cross_entropy(_at(logits, nll), case.targets[nll], reduction="sum")
        if kl is not None:
            with torch.no_grad():
                base = (_at(case.base_hidden, kl) @ frozen.T).float().log_softmax(-1)
            tuned = _at(logits, kl).log_softmax(-1)
            loss = loss + kl_div(tuned, base, reduction="sum", log_target=True)
        loss.backward()

    def trl() -> None:
        logp = ChunkedLogProbFunction.apply(
            case.hidden,
            case.weight,
            None,
            case.targets,
            1.0,
            TRL_COLUMNS,
            None,
            1.0,
            ("log_probs",),
        )[0]
        (-logp.sum()).backward()

    def ours(base: Base | None, nll_N: Tensor, kl_N: Tensor, *, told: bool = True) -> None:
        weights = [mask.new_ones(int(mask.sum()), dtype=torch.float32) for mask in (nll_N, kl_N)]
        nll, kl = token_losses(
            case.hidden,
            Head(case.weight),
            case.targets,
            nll_N=nll_N,
            kl_N=kl_N,
            base=base,
            divergence=Divergence(),
            nll_weight=weights[0] if told else None,
            kl_weight=weights[1] if told else None,
        )
        (nll.sum() + kl.sum()).backward()

    def products(base_hidden: Tensor) -> None:
        hidden, size = case.hidden.detach(), chunk_rows(case.hidden.device.type, len(frozen), 2)
        grad_head = torch.zeros_like(frozen) if case.weight.requires_grad else None
        for first in range(0, len(hidden), size):
            rows, others = (x[first : first + size] for x in (hidden, base_hidden))
            logits = rows @ frozen.T
            if len(others):
                others @ frozen.T
            logits @ frozen
            if grad_head is not None:
                grad_head.addmm_(logits.T, rows)

    head, sparse = Head(frozen), case.sparse_base(entries)
    dense, dense_4 = (DenseBase(case.base_hidden[at], head) for at in (every, fourth))
    found: dict[str, Way] = {
        NLL: lambda: materialised(every, None),
        BOTH: lambda: materialised(every, every),
        BOTH_4: lambda: materialised(~fourth, fourth),
        TRL: trl,
        OURS: lambda: ours(None, every, ~every),
        SPARSE: lambda: ours(sparse, every, every),
        DENSE: lambda: ours(dense, every, every),
        UNTOLD: lambda: ours(dense, every, every, told=False),
        DENSE_4: lambda: ours(dense_4, ~fourth, fourth),
        PRODUCTS: lambda: products(case.base_hidden),
        PRODUCTS_4: lambda: products(case.base_hidden[fourth]),
    }
    return found | liger_ways(case)


def _at(rows: Tensor, mask: Tensor) -> Tensor:
    """The rows of a mask; themselves, not a copy, where it is all of them."""
    return rows if bool(mask.all()) else rows[mask]


def liger_missing() -> str | None:
    """Why Liger's losses cannot be run here, or None."""
    if not torch.cuda.is_available():
        return "its kernels are written in Triton and need a GPU; there is none"
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError as error:
        return f"liger-kernel cannot be imported ({error})"
    return None


def liger_ways(case: Case) -> dict[str, Way]:
    if liger_missing():
        return {}
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    nll = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    jsd = LigerFusedLinearJSD(jsd_beta=0.0)  # forward KL
    frozen = case.weight.detach()
    return {
        LIGER_NLL: lambda: nll(case.weight, case.hidden, case.targets).backward(),
        LIGER_JSD: lambda: jsd(
            case.hidden, case.weight, case.base_hidden, frozen, case.targets
        ).backward(),
    }


def peak_bytes(way: Way, device: torch.device) -> int:
    """The most that is allocated at once during a call, above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as record:
        way()
    now = peak = 0
    moves = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(moves, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def seconds(way: Way, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case, entries: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Median seconds and peak bytes of each way."""
    device, times = case.hidden.device, dict[str, list[float]]()
    found, peaks = ways(case, entries), dict[str, int]()

    def forget() -> None:
        case.hidden.grad = case.weight.grad = None

    for name, way in found.items():  # also the warm-up
        peaks[name] = peak_bytes(way, device)
        forget()
    for i in range(rounds):
        for name in list(found) if i % 2 else reversed(list(found)):
            times.setdefault(name, []).append(seconds(found[name], device))
            forget()
    return {name: (statistics.median(times[name]), peaks[name]) for name in found}


Aim = tuple[str, float, float, float | None]


def aims(v: int, found: dict[str, tuple[float, int]]) -> list[Aim]:
    """(what, ratio, at most, the ratio of its products alone) of a size."""
    time_of, peak_of = ({k: pair[i] for k, pair in found.items()} for i in (0, 1))
    wanted: list[Aim] = [
        ("NLL + sparse KL / trl NLL, time", time_of[SPARSE] / time_of[TRL], 1.10, None),
        (
            "NLL + dense KL / materialised, time",
            time_of[DENSE] / time_of[BOTH],
            0.60,
            time_of[PRODUCTS] / time_of[BOTH],
        ),
        (
            "the same, 1 in 4",
            time_of[DENSE_4] / time_of[BOTH_4],
            0.60,
            time_of[PRODUCTS_4] / time_of[BOTH_4],
        ),
    ]
    if v >= 128_000:
        wanted += [
            (f"{name} / materialised, peak", peak_of[name] / peak_of[BOTH], 1 / 8, None)
            for name in (SPARSE, DENSE)
        ]
    return wanted


def main(
    sizes: Annotated[str, typer.Option(help="H x V x N, comma-separated; head frozen")] = SIZES,
    trained_sizes: Annotated[str, typer.Option(help="The same, head trained")] = TRAINED_SIZES,
    entries: Annotated[int, typer.Option(help="Tokens that the sparse base lists")] = 64,
    rounds: int = 3,
    threads: int = 2,
) -> None:
    """Print one table, and which aims are met at which sizes."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads"
    table = Table(title=f"objective, forward + backward; {named}, torch {torch.__version__}")
    for column in ("head", "H x V x N", "way", "seconds", "/ mat. NLL+KL", "/ trl NLL"):
        table.add_column(column, justify="left" if column in ("head", "way") else "right")
    for column in ("peak MiB", "peak / mat. NLL+KL"):
        table.add_column(column, justify="right")
    results: list[tuple[str, Aim]] = []
    for kind, chosen in (("frozen", sizes), ("trained", trained_sizes)):
        for size in filter(None, chosen.split(",")):
            h, v, n = map(int, size.split("x"))
            case = Case.random(h, v, n, device, kind == "trained")
            found = measure(case, entries, rounds)
            for name, (took, peak) in found.items():
                table.add_row(
                    kind,
                    size,
                    name,
                    f"{took:.3f}",
                    f"{took / found[BOTH][0]:.2f}",
                    f"{took / found[TRL][0]:.2f}",
                    f"{peak / 2**20:.0f}",
                    f"{peak / found[BOTH][1]:.3f}",
                )
            table.add_section()
            results += [(f"{kind:7} {size:16}", aim) for aim in aims(v, found)]
    console = Console(width=150)
    console.print(table)
    if reason := liger_missing():
        console.print(f"{LIGER_NLL}, {LIGER_JSD}: not run: {reason}")
    for where, (what, ratio, most, least) in results:
        verdict = "met" if ratio <= most else "MISSED"
        floor = "" if least is None else f"  products alone {least:.3f}"
        console.print(f"{where} {what:36} {ratio:6.3f}  aim {most:.3f}  {verdict:6}{floor}")


if __name__ == "__main__":
    typer.run(main)
