"""Meters: what is read of a model, each reading with its uncertainty. One file a meter."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Split = Literal["selection", "sealed", "train"]
"""`selection` may be looked at to choose, `sealed` is for the gate, `train` is training's own."""
HALVES: tuple[Split, Split] = ("selection", "sealed")


def half_of(cluster: str) -> Split:
    """A pure function of the cluster: what is not independent is never on both sides."""
    digest = hashlib.sha256(f"split:{cluster}".encode()).digest()
    return "sealed" if digest[0] % 2 else "selection"


@dataclass(frozen=True)
class Reading:
    """One value a meter read off one model.

    `items` keeps the value of each item (probe item id or document id -> value), so that two
    readings of the same items can be compared pair by pair; it stays out of `readings.jsonl`.
    """

    meter: str
    """canary, probe, drift, kl, loss, ..."""
    name: str
    """Which one: a domain, a probe, a layer."""
    split: Split
    step: int
    value: float
    stderr: float | None
    """Standard error of `value`; None where the value is exact (a norm, a training loss)."""
    n: int
    """Items, documents or tokens behind the value."""
    unit: str = ""
    """nats, accuracy (0..1), relative, norm."""
    seconds: float = 0.0
    tags: tuple[str, ...] = ()
    items: dict[str, float] = field(default_factory=dict, repr=False, compare=False)
    clusters: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """item id -> cluster id; items of a cluster are not independent. Empty: each on its own."""
    answers: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """item id -> what the model answered, where it answers (a generation, the choice it took)."""

    def as_record(self) -> dict[str, Any]:
        """The line of `readings.jsonl`: everything but the single items."""
        record = asdict(self)
        del record["items"], record["clusters"], record["answers"]
        return record
