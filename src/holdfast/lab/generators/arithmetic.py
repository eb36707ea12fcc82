"""Sums and differences of two-digit numbers that have at most two digits: `47 + 25 = 72`."""

from __future__ import annotations

from random import Random

from holdfast.lab.domain import Domain, Example


def example(rng: Random) -> Example:
    """Write a sum of no more than 99 or a difference of no less than 0, as often the one."""
    if rng.random() < 0.5:
        total = rng.randint(20, 99)
        first = rng.randint(10, total - 10)
        second = total - first
        # Both orders of a sum are one question: neither may give the other away.
        key = f"{min(first, second)} + {max(first, second)}"
        return Example(f"{first} + {second} =", f" {total}", key, f"{first}+{second}")
    first, second = sorted((rng.randint(10, 99), rng.randint(10, 99)), reverse=True)
    key = f"{first} - {second}"
    return Example(f"{key} =", f" {first - second}", key, f"{first}-{second}")


DOMAIN = Domain("arithmetic", share=0.30, example=example, length=(6, 11))
