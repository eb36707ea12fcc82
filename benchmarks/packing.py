"""How many of the positions that a step passes through the model hold a token?

    python benchmarks/packing.py

Steps of rows whose lengths are lognormal, as instruction data's are, or alike, as the lab's are.
Packed: rows at the full width against rows at the width that leaves the fewest positions empty.
One document a row (models that would let packed ones see each other): micro-batches dealt evenly by
tokens, as the packed rows are, against micro-batches of like length.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from holdfast.data.packing import by_length, deal_by_length, pack, pack_tight, rounded

STEPS = 20
WIDTH = 2048
LIMIT = 8192
CASES = {
    "lognormal, median 150": (5.0, 1.0),
    "lognormal, median 400": (6.0, 0.7),
    "all about 20": (3.0, 0.05),
}


def main() -> None:
    """A table for packed rows, one for rows of one document."""
    random = np.random.default_rng(0)
    print("packed into rows of at most 2048; positions for each token, and ms a step to pack\n")
    print(f"{'lengths':24}{'tokens a step':>14}{'full width':>12}{'tight':>8}{'ms':>8}{'ms':>8}")
    for tokens in (2_000, 16_000, 128_000):
        for name, of in CASES.items():
            steps = [lengths(random, *of, tokens) for _ in range(STEPS)]
            full, full_ms = timed(steps, lambda some: positions(some, pack(some, WIDTH)))
            tight, ms = timed(steps, lambda some: positions(some, pack_tight([some], WIDTH)[0]))
            print(f"{name:24}{tokens:14,}{full:12.2f}{tight:8.2f}{full_ms:8.1f}{ms:8.1f}")
    print(
        "\none document a row; positions for each token, and of the largest micro-batch; how many"
    )
    print(f"micro-batches a step needs for none to be larger than {LIMIT:,}\n")
    print(f"{'lengths':24}{'parts':>6}{'by tokens':>20}{'by length':>20}{'needs':>8}")
    for name, of in CASES.items():
        for parts in (1, 4, 16):
            steps = [lengths(random, *of, LIMIT * parts) for _ in range(STEPS)]
            dealt = [(by_tokens(some, parts), deal_by_length(some, parts)) for some in steps]
            line = f"{name:24}{parts:6}"
            for way in (0, 1):
                areas = [
                    [len(part) * max(some[i] for i in part) for part in found[way] if part]
                    for some, found in zip(steps, dealt, strict=True)
                ]
                each = sum(map(sum, areas)) / sum(map(sum, steps))
                line += f"{each:8.2f}{max(map(max, areas)):12,}"
            print(f"{line}{max(len(by_length(some, LIMIT)) for some in steps):8}")


def lengths(random: np.random.Generator, mean: float, spread: float, tokens: int) -> list[int]:
    """Of documents that have so many tokens together."""
    some: list[int] = []
    while sum(some) < tokens:
        some.append(int(np.clip(np.exp(random.normal(mean, spread)), 4, WIDTH)))
    return some


def positions(some: list[int], bins: list[list[int]]) -> int:
    """Of rows that are all as wide as the widest."""
    widest = max(sum(some[index] for index in members) for members in bins)
    return rounded(widest) * len(bins)


def timed(steps: list[list[int]], count: Callable[[list[int]], int]) -> tuple[float, float]:
    """Positions for each token, and milliseconds a step."""
    started = time.perf_counter()
    found = sum(map(count, steps))
    return found / sum(map(sum, steps)), (time.perf_counter() - started) / len(steps) * 1e3


def by_tokens(some: list[int], parts: int) -> list[list[int]]:
    """The longest first, each to the part that has the fewest tokens."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for index in sorted(range(len(some)), key=lambda i: -some[i]):
        lightest = load.index(min(load))
        dealt[lightest].append(index)
        load[lightest] += some[index]
    return dealt


if __name__ == "__main__":
    main()
