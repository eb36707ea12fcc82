"""Documents as a reference knows them: by their content, read by the base a batch at a time.

Shape suffixes: B rows, W positions in a row, N positions of several documents end to end, H hidden
size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast import model as models
from holdfast.reference.encoding import Array

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 8192
"""Padded tokens of one forward pass."""


def key_of(input_ids: Any) -> bytes:
    """What a document is known by: blake2b-128 of its token ids as int32."""
    return hashlib.blake2b(np.ascontiguousarray(input_ids, "<i4").data, digest_size=16).digest()


def by_length(rows: Iterable[Sequence[int]]) -> dict[bytes, Array]:
    """Token ids of each different row of two tokens and more, the shortest first."""
    found = {key_of(row): np.asarray(row, np.int32) for row in rows if len(row) > 1}
    return {key: found[key] for key in sorted(found, key=lambda key: (len(found[key]), key))}


def packed(ids_BW: Array, positions_BW: Array, wanted_BW: Array) -> Iterator[tuple[Array, Array]]:
    """Tokens and wanted positions of each document with any, row by row."""
    for ids, positions, wanted in zip(ids_BW, positions_BW, wanted_BW, strict=True):
        starts = np.flatnonzero(positions == 0)
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if wanted[start:end].any():
                yield ids[start:end], wanted[start:end]


def batches(documents: Iterable[Array]) -> Iterator[list[Array]]:
    """Documents in order of length, as many as a forward pass takes."""
    batch: list[Array] = []
    for document in documents:
        if batch and len(document) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def hidden_of(model: Any, documents: Sequence[Array]) -> torch.Tensor:
    """The model's last hidden states (N, H) at all positions but each document's last one.

    In eval mode and without a gradient; the model is left in the mode it was in.
    """
    import torch

    width, device = max(map(len, documents)), models.causal_lm(model).device
    ids_BW = torch.zeros(len(documents), width, dtype=torch.long)
    inside_BW = torch.zeros_like(ids_BW, dtype=torch.bool)
    for b, document in enumerate(documents):
        ids_BW[b, : len(document)] = torch.from_numpy(document)
        inside_BW[b, : len(document) - 1] = True
    positions_BW = torch.arange(width).expand_as(ids_BW)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden_BWH = models.hidden_states(model, ids_BW.to(device), positions_BW.to(device))
            return hidden_BWH[inside_BW.to(device)]
    finally:
        model.train(training)
