"""Which rows form optimizer step s: a pure function of (seed, s), so resuming is exact.

Each stream is an endless line of its rows, epoch after epoch, each epoch in an order of its own.
After s steps a stream has been asked for

    T(s) = round(share * batch_tokens * s)        tokens

and step s takes exactly the rows whose first token lies in [T(s), T(s+1)) on the line. So a share
is a share of *tokens*, kept to within one row however long the run is, and no stream's order
depends on another stream, on the number of devices, or on what was asked before.

A run may give the lesson more or less of the tokens from some step on (`reshare`). The schedule of
these factors is the one thing to save; s is then replaced by the sum of the factors before s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TypedDict

from holdfast.data.example import Role
from holdfast.data.packing import (
    MicroBatch,
    PackedRow,
    by_length,
    collate,
    deal_by_length,
    pack_tight,
)
from holdfast.data.stream import Line, Order, Stream

__all__ = ["Budget", "Document", "Mixture", "Stream", "steps_for_epochs"]

Document = tuple[int, int]
"""(index of the stream, row in the stream)."""
SAMPLED = 64
"""Steps that are looked at for how much padding there is."""


class Budget(TypedDict):
    """What a run takes from one stream."""

    tokens: int
    rows: int
    epochs: float
    """Times the stream is gone through; 0.5 is half of it, once."""


class Mixture:
    """Streams mixed by tokens, as a map-style dataset of micro-batches in training order.

    Item ``step * micro_batches + m`` is micro-batch m of an optimizer step, so a sequential
    sampler and ``micro_batches`` accumulation steps walk through the run.

    Args:
        streams: what is mixed; their names differ. The shares usually sum to one, then a step
            has ``batch_tokens`` tokens to within a row a stream.
        batch_tokens: tokens in one optimizer step, over all devices.
        seed: not negative; another seed is another order of every stream.
        steps: optimizer steps in the run.
        micro_batches: parts a step is dealt into.
        width: positions in a packed row; no document is longer.
        pad_token_id: fills what is left of a row.
        order: of the rows within each stream (`stream.Line`).
        packed: several documents to a row; False gives each a row of its own, for models that
            would let packed documents see each other (`packing.keeps_documents_apart`).
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        batch_tokens: int,
        seed: int,
        steps: int,
        micro_batches: int,
        width: int,
        pad_token_id: int,
        order: Order = "random",
        packed: bool = True,
    ) -> None:
        names = [stream.name for stream in streams]
        if not streams or len(set(names)) < len(names):
            raise ValueError(f"streams need one name each, and there must be some; got {names}")
        for stream in streams:
            if (longest := int(stream.lengths.max())) > width:
                raise ValueError(
                    f"stream {stream.name}: a row of {longest} tokens, but width is {width}"
                )
        if min(batch_tokens, steps, micro_batches) < 1:
            raise ValueError("batch_tokens, steps and micro_batches must be at least 1")
        self.streams = list(streams)
        self.batch_tokens = batch_tokens
        self.steps = steps
        self.micro_batches = micro_batches
        self.width = width
        self.pad_token_id = pad_token_id
        self.packed = packed
        self.schedule: list[tuple[int, float]] = []
        """From which step on the lesson's share is multiplied by what, in order."""
        self.anchors_apart = True
        """Whether a row holds anchors alone or none: for what reads only those rows."""
        self._lines = [Line(stream, seed, order) for stream in streams]
        self._dealt: tuple[int, list[list[list[Document]]]] = (-1, [])

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    @property
    def lesson_share(self) -> float:
        """What the lesson's share is multiplied by at the end of the schedule."""
        return self.schedule[-1][1] if self.schedule else 1.0

    def reshare(self, step: int, factor: float) -> None:
        """From this step on, multiply the lesson's share; the other streams take up the rest.

        Steps before it stay as they are. Nothing changes where there is no other stream.
        """
        if self.schedule and step <= self.schedule[-1][0]:
            raise ValueError(f"step {step} is not after {self.schedule[-1][0]}, which is set")
        self.schedule.append((step, factor))

    def __getitem__(self, index: int) -> MicroBatch:
        """Micro-batch ``index`` of the run, in training order."""
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        step, part = divmod(index, self.micro_batches)
        if self._dealt[0] != step:
            self._dealt = (step, self._deal(step))
        bins = [[self._fetch(document) for document in row] for row in self._dealt[1][part]]
        return collate(bins or [[]], pad_token_id=self.pad_token_id)

    def rows_at(self, step: int) -> list[Document]:
        """The rows of an optimizer step, stream by stream, each in its line's order."""
        found = []
        for index, line in enumerate(self._lines):
            first, last = (line.rows_before(self._asked(line, s)) for s in (step, step + 1))
            found += [(index, int(row)) for row in line.rows(first, last)]
        return found

    def padded_parts(self, limit: int) -> int:
        """Micro-batches of a step that keep each within so many positions, one document a row.

        As found in up to `SAMPLED` steps of the run.
        """
        steps = range(0, self.steps, -(-self.steps // SAMPLED))
        rows = ([self._length(document) for document in self.rows_at(step)] for step in steps)
        return max(len(by_length(lengths, limit)) for lengths in rows)

    def tokens_at(self, step: int) -> dict[str, int]:
        """Tokens of each stream in an optimizer step."""
        return {
            line.stream.name: self._served(line, step + 1) - self._served(line, step)
            for line in self._lines
        }

    def token_budget(self, steps: int) -> dict[str, Budget]:
        """What the first ``steps`` steps take from each stream."""
        budget = {}
        for line in self._lines:
            tokens = self._served(line, steps)
            budget[line.stream.name] = Budget(
                tokens=tokens,
                rows=line.rows_before(self._asked(line, steps)),
                epochs=tokens / line.tokens,
            )
        return budget

    def _asked(self, line: Line, step: int) -> int:
        """T(s): tokens the stream has been asked for before step s."""
        return round(line.stream.share * self.batch_tokens * self._weighted(line.stream, step))

    def _weighted(self, stream: Stream, step: int) -> float:
        """The sum of the factors of this stream's share over the steps before `step`."""
        lesson = sum(one.share for one in self.streams if one.role is Role.TASK)
        rest = sum(one.share for one in self.streams if one.role is not Role.TASK)
        total, since, now = 0.0, 0, 1.0
        for start, factor in self.schedule if rest else ():
            if start >= step:
                break
            total, since = total + now * (start - since), start
            now = factor if stream.role is Role.TASK else 1 + lesson * (1 - factor) / rest
        return total + now * (step - since)

    def _served(self, line: Line, step: int) -> int:
        """Tokens of the rows served before step s: T(s), and the rest of the row it lies in."""
        return line.tokens_before(line.rows_before(self._asked(line, step)))

    def _pack(self, documents: list[Document]) -> list[list[Document]]:
        """Documents into rows.

        Rows are kept shorter than ``width`` if there would else be too few to go round.
        """
        groups = [documents]
        if self.anchors_apart:
            groups = [
                [d for d in documents if (self._role(d) is Role.ANCHOR) is anchors]
                for anchors in (False, True)
            ]
        lengths = [[self._length(document) for document in some] for some in groups]
        total, longest = sum(map(sum, lengths)), max(chain(*lengths), default=1)
        even = max(-(-total // self.micro_batches), longest)
        packed = pack_tight(lengths, min(even, self.width))
        return [
            [some[index] for index in members]
            for some, bins in zip(groups, packed, strict=True)
            for members in bins
        ]

    def _deal(self, step: int) -> list[list[list[Document]]]:
        """For each micro-batch of a step its rows, each a list of documents.

        The fullest row goes first, each to the micro-batch that has the fewest tokens so far. Of
        rows that hold one document, which are padded, those of like length go together.
        """
        documents = self.rows_at(step)
        if not self.packed:
            alike = deal_by_length([self._length(d) for d in documents], self.micro_batches)
            return [[[documents[index]] for index in part] for part in alike]
        packed = self._pack(documents)
        weight = [sum(self._length(document) for document in row) for row in packed]
        parts: list[list[list[Document]]] = [[] for _ in range(self.micro_batches)]
        load = [0] * self.micro_batches
        for index in sorted(range(len(packed)), key=lambda i: (-weight[i], i)):
            lightest = load.index(min(load))
            parts[lightest].append(packed[index])
            load[lightest] += weight[index]
        return parts

    def _fetch(self, document: Document) -> PackedRow:
        index, row = document
        stream = self.streams[index]
        return PackedRow(*stream.fetch(row), stream.role)

    def _length(self, document: Document) -> int:
        return int(self.streams[document[0]].lengths[document[1]])

    def _role(self, document: Document) -> Role:
        return self.streams[document[0]].role


def steps_for_epochs(task_tokens: int, share: float, batch_tokens: int, epochs: float) -> int:
    """The fewest steps in which a stream of ``task_tokens`` is gone through ``epochs`` times."""
    return max(1, math.ceil(epochs * task_tokens / (share * batch_tokens) - 1e-9))
