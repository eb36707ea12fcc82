"""A stream: rows of one kind, laid out as an endless line, epoch after epoch.

The line is a pure function of (seed, the stream's name, its rows): each epoch is a permutation
seeded by ``[seed, hash(name), epoch]``. Nothing but a cache of two epochs is held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from holdfast.data.example import Example, Role
from holdfast.data.herding import directions, herded

if TYPE_CHECKING:
    from datasets import Dataset

Order = Literal["herded", "random"]
_EPOCHS_KEPT = 2
"""Epoch orders held in memory for each stream: the one being read, and its neighbour."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Rows of one kind, and how much of every step they are."""

    name: str
    """Such as "task" or "replay/code"; it seeds the order, so it is unique in a mixture."""
    role: Role
    """What the loss on these rows is for."""
    share: float
    """The fraction of each step's tokens that come from here, 0 to 1; 0 turns the stream off."""
    lengths: NDArray[np.int64]
    """(n,) tokens in each row, all positive."""
    fetch: Callable[[int], tuple[Sequence[int], Sequence[bool]]]
    """Row number to its ``input_ids`` and ``loss_mask``."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 + 1e-9:  # normalised shares may round up
            raise ValueError(f"stream {self.name}: share must be 0 to 1, got {self.share}")
        if not len(self.lengths) or self.lengths.min() < 1:
            raise ValueError(f"stream {self.name}: needs at least one row, and no empty row")

    @classmethod
    def of(cls, name: str, role: Role, share: float, rows: Sequence[Example] | Dataset) -> Stream:
        """A stream of examples in memory, or of a dataset made by `encode_all`."""
        if isinstance(rows, Sequence):
            lengths = [len(example.input_ids) for example in rows]
            return cls(name, role, share, np.array(lengths, np.int64), partial(_example, rows))
        import pyarrow.compute as pc

        sizes = pc.list_value_length(_arrow(rows, "input_ids")).to_numpy().astype(np.int64)
        return cls(name, role, share, sizes, partial(_record, rows))

    @property
    def tokens(self) -> int:
        """Tokens in one epoch."""
        return int(self.lengths.sum())


class Line:
    """A stream as an endless line of rows, cut anywhere in O(log n).

    Args:
        order: random, or herded: neighbours are unlike one another (`herding`), so that each step
            has some of every kind.
    """

    def __init__(self, stream: Stream, seed: int, order: Order = "random") -> None:
        self.stream, self.order = stream, order
        self.tokens = stream.tokens
        self._seed = (seed, _stable_hash(stream.name))
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @cached_property
    def _directions(self) -> NDArray[np.float64]:
        return directions(len(self.stream.lengths), lambda row: self.stream.fetch(row)[0])

    def rows_before(self, token: int) -> int:
        """How many rows begin before this token of the line."""
        epoch, offset = divmod(token, self.tokens)
        _, starts = self._epoch(epoch)
        return epoch * len(starts) + int(np.searchsorted(starts, offset, side="left"))

    def rows(self, first: int, last: int) -> NDArray[np.int64]:
        """Row numbers from the line's ``first`` row up to, not with, its ``last``."""
        n = len(self.stream.lengths)
        parts = [
            self._epoch(epoch)[0][max(first - epoch * n, 0) : last - epoch * n]
            for epoch in range(first // n, -(-last // n))
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def tokens_before(self, row: int) -> int:
        """The token of the line at which its row number ``row`` begins."""
        epoch, index = divmod(row, len(self.stream.lengths))
        return epoch * self.tokens + int(self._epoch(epoch)[1][index])

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Order (n,) of the rows in an epoch, and the offset (n,) at which each begins."""
        if epoch not in self._epochs:
            random = np.random.default_rng(np.random.SeedSequence([*self._seed, epoch]))
            order = (
                herded(self._directions, random)
                if self.order == "herded"
                else random.permutation(len(self.stream.lengths))
            )
            lengths = self.stream.lengths[order]
            self._epochs[epoch] = (order, np.cumsum(lengths) - lengths)
            while len(self._epochs) > _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]


def column(rows: Sequence[Example] | Dataset, name: str) -> list[Any]:
    """One field of every row."""
    if isinstance(rows, Sequence):
        return [getattr(row, name) for row in rows]
    return list(rows[name])


def some_of(
    rows: Sequence[Example] | Dataset, chosen: Sequence[int]
) -> Sequence[Example] | Dataset:
    """The rows of these numbers, in this order."""
    return [rows[i] for i in chosen] if isinstance(rows, Sequence) else rows.select(chosen)


def learned(rows: Sequence[Example] | Dataset) -> int:
    """Tokens of all rows that are learned."""
    if isinstance(rows, Sequence):
        return sum(sum(row.loss_mask) for row in rows)
    import pyarrow.compute as pc

    found: int = pc.sum(pc.list_flatten(_arrow(rows, "loss_mask"))).as_py()
    return found


def _arrow(rows: Dataset, name: str) -> Any:
    return rows.select_columns(name).with_format("arrow")[:][name]


def _stable_hash(name: str) -> int:
    """A number for a name, the same in every process (unlike ``hash``)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _example(rows: Sequence[Example], index: int) -> tuple[Sequence[int], Sequence[bool]]:
    return rows[index].input_ids, rows[index].loss_mask


def _record(rows: Dataset, index: int) -> tuple[Sequence[int], Sequence[bool]]:
    record: dict[str, Any] = rows[index]
    return record["input_ids"], record["loss_mask"]
