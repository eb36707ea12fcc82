"""Tokens a second of self-generated rows: holdfast's decoding beside transformers' generate.

Both sample the same number of rows from BOS at temperature 1 up to the same length, in turns within
one process, so that whatever else the machine does falls on both. Tokens count up to and with the
end token. `generate` runs at holdfast's number of rows side by side and at others, and its best is
named too. The last line says what share of holdfast's time is the model's own forward pass.

    python benchmarks/sampling.py --model PATH      # default: the lab's base
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GenerationConfig

from holdfast.decode import end_tokens, write_on
from holdfast.lab import base_path
from holdfast.model import Model, load_model, load_tokenizer

REALTEXT = Path(__file__).parents[2] / "shared" / "models" / "realtext4m"


def ours(lm: Any, tokenizer: Any, start: int, rows: int, length: int, seed: int) -> int:
    """Tokens written in slots."""
    texts = write_on(
        lm,
        tokenizer,
        [[start]] * rows,
        max_new_tokens=length,
        temperature=1.0,
        seed=[seed],
        slots=min(rows, 256),
    )
    return sum(map(len, texts))


def theirs(
    lm: Any, tokenizer: Any, start: int, rows: int, length: int, seed: int, batch: int
) -> int:
    """Tokens written by generate, `batch` rows at a time, with nothing that bends the softmax."""
    ends = end_tokens(lm, tokenizer)
    kept, lm.generation_config = lm.generation_config, GenerationConfig()
    torch.manual_seed(seed)
    total = 0
    try:
        for begin in range(0, rows, batch):
            ids = torch.full((min(batch, rows - begin), 1), start, device=lm.device)
            with torch.inference_mode():
                out = lm.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=GenerationConfig(
                        max_new_tokens=length,
                        do_sample=True,
                        top_k=0,
                        eos_token_id=ends,
                        pad_token_id=tokenizer.pad_token_id,
                    ),
                )
            ended = torch.isin(out[:, 1:], torch.tensor(ends, device=lm.device))
            first = ended.long().argmax(1) + 1
            total += int(torch.where(ended.any(1), first, out.shape[1] - 1).sum())
    finally:
        lm.generation_config = kept
    return total


def clock(write: Callable[[], int]) -> tuple[float, float]:
    """Tokens a second of wall time, and of this process's own CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = write()
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def forward_share(lm: Any, write: Callable[[], int]) -> float:
    """Fraction of the time that is spent inside the model's forward pass."""
    spent, begun = [0.0], [0.0]

    def enter(*_: Any) -> None:
        begun[0] = time.perf_counter()

    def leave(*_: Any) -> None:
        spent[0] += time.perf_counter() - begun[0]

    hooks = lm.register_forward_pre_hook(enter), lm.register_forward_hook(leave)
    started = time.perf_counter()
    write()
    whole = time.perf_counter() - started
    for hook in hooks:
        hook.remove()
    return spent[0] / whole


def compare(path: str, rows: int, length: int, batches: list[int], rounds: int) -> None:
    """Print one model's figures."""
    settings = Model(path=path, dtype="float32")
    tokenizer = load_tokenizer(settings)
    lm = load_model(settings, adapter=False, tokenizer=tokenizer).eval()
    lm.to("cuda" if torch.cuda.is_available() else "cpu")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ways: dict[str, Callable[[int], int]] = {
        "holdfast": lambda seed: ours(lm, tokenizer, start, rows, length, seed)
    }
    for batch in batches:
        ways[f"generate, batch {batch}"] = lambda seed, batch=batch: theirs(
            lm, tokenizer, start, rows, length, seed, batch
        )
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for seed in range(rounds):
        for name, write in ways.items():
            speeds[name].append(clock(lambda write=write, seed=seed: write(seed)))
    print(f"\nmodel {Path(path).name}, {rows} rows of at most {length} tokens, {lm.device.type}")
    medians, by_cpu = {}, {}
    for name, both in speeds.items():
        wall, cpu = (statistics.median(values) for values in zip(*both, strict=True))
        medians[name], by_cpu[name] = wall, cpu
        print(f"{name:22} {wall:9,.0f} tokens/s  ({cpu:,.0f} a second of CPU time)")
    same = f"generate, batch {batches[0]}"
    best = max((name for name in medians if name != "holdfast"), key=medians.__getitem__)
    for label, name in (("same batch", same), (f"its best ({best})", best)):
        wall, cpu = (speed["holdfast"] / speed[name] for speed in (medians, by_cpu))
        print(f"ratio to {label}: {wall:.2f}, by CPU time {cpu:.2f}   aim 2")
    share = forward_share(lm, lambda: ours(lm, tokenizer, start, rows, length, 0))
    print(f"share of holdfast's time in the model's forward pass: {share:.0%}")


def main(
    model: Annotated[str | None, typer.Option(help="Folder; empty: lab and realtext4m")] = None,
    rows: int = 256,
    length: int = 256,
    batches: Annotated[
        str, typer.Option(help="Rows side by side; the first is ours")
    ] = "256,64,32",
    rounds: int = 3,
    threads: int = 2,
) -> None:
    """Alternate the ways to sample and print their medians."""
    torch.set_num_threads(threads)
    found = [str(base_path()), *([str(REALTEXT)] if REALTEXT.is_dir() else [])]
    for path in [model] if model else found:
        # as long as the model's context at most: BOS and what follows
        compare(path, rows, length - 1, [int(batch) for batch in batches.split(",")], rounds)


if __name__ == "__main__":
    typer.run(main)
