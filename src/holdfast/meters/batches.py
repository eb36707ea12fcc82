"""Texts as padded batches, for meters that look at more of a forward pass than its likelihood.

Shape suffixes: B rows of a batch, W positions in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.meters.scoring import BATCH_TOKENS, Scored

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Some texts side by side, padded on the right, which a causal model never looks at."""

    numbers: list[int]
    """Which texts they are, row by row."""
    ids_BW: torch.Tensor
    positions_BW: torch.Tensor
    scored_BW: torch.Tensor
    """True where the *next* token is scored."""
    real_BW: torch.Tensor
    """False in the padding."""


def batches(
    texts: Sequence[Scored], device: Any, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Batch]:
    """The longest first; a batch has at most `batch_tokens` padded tokens, one row at least."""
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i].input_ids), i))
    while order:
        longest = max(1, len(texts[order[0]].input_ids))
        count = max(1, batch_tokens // longest)
        numbers, order = order[:count], order[count:]
        yield _padded(texts, numbers, longest, device)


def _padded(texts: Sequence[Scored], numbers: list[int], width: int, device: Any) -> Batch:
    import torch

    ids_BW = torch.zeros(len(numbers), width, dtype=torch.long)
    scored_BW, real_BW = torch.zeros(2, len(numbers), width, dtype=torch.bool)
    for row, number in enumerate(numbers):
        text = texts[number]
        length = len(text.input_ids)
        ids_BW[row, :length] = torch.tensor(text.input_ids)
        real_BW[row, :length] = True
        scored_BW[row, : length - 1] = torch.tensor(text.loss_mask[1:], dtype=torch.bool)
    positions_BW = torch.arange(width).expand(len(numbers), -1)
    return Batch(numbers, *(t.to(device) for t in (ids_BW, positions_BW, scored_BW, real_BW)))
