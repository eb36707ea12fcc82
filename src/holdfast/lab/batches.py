"""Documents packed into rows, each of them as alone as it will be when the model is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

IGNORED = -100


class Batch(NamedTuple):
    """Rows of whole documents.

    Positions start at zero in every document.  Given these and no attention mask, and told not
    to keep a cache, transformers lets no document attend to another.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor


def pack(documents: Iterable[list[int]], *, rows: int, width: int, pad: int) -> Iterator[Batch]:
    """Lay token lists whole into batches of rows, each list in the first row it fits in.

    A batch is full when a list fits nowhere; what remains of its rows is padding.  A batch that
    the last list does not fill is not given out.
    """
    filling: list[list[list[int]]] = [[] for _ in range(rows)]
    room = [width] * rows
    for document in documents:
        if len(document) > width:
            raise ValueError(f"a document of {len(document)} tokens does not fit in {width}")
        row = next((row for row in range(rows) if room[row] >= len(document)), None)
        if row is None:
            yield _batch(filling, width, pad)
            filling = [[] for _ in range(rows)]
            room = [width] * rows
            row = 0
        filling[row].append(document)
        room[row] -= len(document)


def _batch(filling: list[list[list[int]]], width: int, pad: int) -> Batch:
    """Make the tensors; a document's first token, and padding, are nothing to predict."""
    batch = Batch(
        input_ids=torch.full((len(filling), width), pad),
        position_ids=torch.zeros(len(filling), width, dtype=torch.long),
        labels=torch.full((len(filling), width), IGNORED),
    )
    for row, documents in enumerate(filling):
        start = 0
        for document in documents:
            span = slice(start, start + len(document))
            tokens = torch.tensor(document)
            batch.input_ids[row, span] = tokens
            batch.position_ids[row, span] = torch.arange(len(document))
            batch.labels[row, start + 1 : span.stop] = tokens[1:]
            start = span.stop
    return batch
