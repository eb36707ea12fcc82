"""Context frozen against the full sequence: time and memory of a step as the context grows.

The lab's base, its 512 positions extended through its config (rotary, so no weight is added; what
it says beyond them is noise, which no time or memory depends on), on rows of random tokens: one of
them on a CPU, 8 side by side on a GPU. A step is forward and backward, through the trainer's own
`token_losses`. The two ways take turns within one process, so that whatever else the machine does
falls on both; their losses must agree to 1e-5. Memory is the most that a step adds to what the
model holds: on a GPU what torch allocates, on a CPU the resident set, of a process of its own.

    python benchmarks/context_frozen.py
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from holdfast.data.example import Role
from holdfast.data.packing import MicroBatch, PackedRow, collate
from holdfast.lab import base_path
from holdfast.levers import Lever
from holdfast.levers.adapter import Adapter
from holdfast.levers.context_frozen import ContextFrozen
from holdfast.step import token_losses

CONTEXTS = (256, 512, 1024, 2048, 4096)
DECISIONS = 64
AGREE = 1e-5
WAYS: dict[str, list[Lever]] = {"full": [], "frozen": [ContextFrozen(enabled=True)]}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 8 if DEVICE == "cuda" else 1


def base(method: str) -> Any:
    """The lab's base with room for the longest row, wrapped for training."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # peft 0.21 asks for a property that transformers 5.23 renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    model = AutoModelForCausalLM.from_pretrained(
        base_path(),
        dtype=torch.float32,
        max_position_embeddings=max(CONTEXTS) + DECISIONS,
    )
    torch.manual_seed(0)
    return Adapter(method=method).wrap(model).to(DEVICE).train()


def batch(context: int) -> dict[str, torch.Tensor]:
    """Rows whose last 64 predictions are learned, behind `context` positions that are not."""
    generator = torch.Generator().manual_seed(context)
    length = context + DECISIONS + 1
    mask = [place > context for place in range(length)]
    rows = [
        [
            PackedRow(
                torch.randint(4, 2000, (length,), generator=generator).tolist(), mask, Role.TASK
            )
        ]
        for _ in range(ROWS)
    ]
    made: MicroBatch = collate(rows, pad_token_id=0)
    return {name: value.to(DEVICE) for name, value in made.items()}  # type: ignore[attr-defined]


def step(model: Any, rows: dict[str, torch.Tensor], way: str) -> tuple[float, float]:
    """Seconds of forward and backward, and the loss."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    nll = token_losses(model, rows, frozenset(), None, levers=WAYS[way]).nll
    assert len(nll) == ROWS * DECISIONS
    loss = nll.mean()
    loss.backward()
    value = float(loss.detach())
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, value


def added(method: str, context: int, way: str) -> int:
    """Bytes that a step adds at its most to what the model holds."""
    model, rows = base(method), batch(context)
    step(model, batch(16), way)  # what is allocated once, whatever the length
    gc.collect()
    if DEVICE == "cuda":
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(model, rows, way)
        return torch.cuda.max_memory_allocated() - before
    model.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # the resident set's peak begins anew
    before = resident("VmRSS")
    step(model, rows, way)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def line(method: str, context: int, rounds: int) -> None:
    model, rows = base(method), batch(context)
    losses = {way: step(model, rows, way)[1] for way in WAYS}  # warm
    if abs(losses["full"] - losses["frozen"]) > AGREE * max(1.0, losses["full"]):
        raise SystemExit(f"{context} tokens: the losses differ: {losses}")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, found in times.items():
            found.append(step(model, rows, way)[0])
    full, frozen = (1e3 * statistics.median(found) for found in times.values())
    del model
    pool = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    more = [pool.apply(added, (method, context, way)) / 2**20 for way in WAYS]
    pool.close()
    pool.join()
    print(
        f"{method:8} {context:7}  {full:9.1f} {frozen:9.1f} {full / frozen:6.2f}  "
        f"{more[0]:9.1f} {more[1]:9.1f} {more[0] / more[1]:6.2f}",
        flush=True,
    )


def main(
    rounds: Annotated[int, typer.Option(help="Steps of each way.")] = 9,
    method: Annotated[list[str], typer.Option(help="lora, none (full fine-tuning).")] = [  # noqa: B006
        "lora",
        "none",
    ],
    context: Annotated[list[int], typer.Option(help="Context lengths.")] = list(CONTEXTS),  # noqa: B006
) -> None:
    """Print a line for each adapter and context."""
    name = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"{DEVICE} ({name}), fp32, torch {torch.__version__}, rows of a step: {ROWS}")
    print(f"{DECISIONS} decision tokens a row; memory: what a step adds at its most")
    print("adapter  context  full, ms frozen, ms  ratio  full, MiB frozen, MiB ratio")
    for one in method:
        for length in context:
            line(one, length, rounds)


if __name__ == "__main__":
    typer.run(main)
