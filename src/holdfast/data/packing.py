"""Documents of many lengths into rows of few, with no attention from one to another.

Shapes: B rows, W positions in a row. Documents lie end to end in a row, and each counts its
positions from 0. That restart is how transformers 5 tells them apart and builds a
block-diagonal causal mask (``masking_utils.find_packed_sequence_indices``); it does so only when
the model gets **no attention mask and no cache**: call ``model(input_ids, position_ids=...,
use_cache=False)``.

Not every model heeds it. Most do (Llama, Mistral, Qwen2/3, Gemma, Phi, GPT-2, GPT-NeoX, Mixtral);
GPT-OSS, Falcon, OPT, BLOOM and MPT in transformers 5.23 do not, nor do models with a recurrent or
convolutional layer (Mamba, Jamba, LFM2, Qwen3-Next), whose state runs across documents.
`keeps_documents_apart` finds out; where it says no, put one document in a row: padding on the
right cannot reach back in any causal model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from holdfast.data.example import Role

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100
"""The target where there is nothing to predict; torch's cross entropy skips it."""
MULTIPLE = 8
"""A row's width is a multiple of it, which products of half precision are faster for."""
WIDTHS = 16
"""How many narrower widths are tried for the rows of a step."""
SPARE = 0.02
"""Part of a step's positions that may hold nothing without a narrower width being looked for: of
6,000 short documents that would take longer than it saves (benchmarks/packing.py)."""


class PackedRow(NamedTuple):
    """One document on its way into a batch."""

    input_ids: Sequence[int]
    """(n,) token ids."""
    loss_mask: Sequence[bool]
    """(n,) True where predicting the token is trained."""
    role: Role
    """What the loss on those tokens is for."""


class MicroBatch(TypedDict):
    """What one forward pass is given; every tensor is (B, W) int64."""

    input_ids: Tensor
    position_ids: Tensor
    """Each token's place in its own document."""
    targets: Tensor
    """The next token of the same document, learned or not; `IGNORE` where there is none."""
    roles: Tensor
    """The `Role` of the prediction made at this position: the document's where the next token is
    a response token, 0 elsewhere."""


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """First-fit decreasing: the longest first, each into the first bin that has room.

    At most 11/9 of the best number of bins, plus one (Dósa 2007). A tree over the bins holds the
    largest room below each node, so the first fitting bin is found in O(log n).

    Args:
        lengths: length of each item, 1 to ``width``.
        width: what a bin holds.

    Returns:
        For each bin the indices of its items. The same input gives the same bins.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= width:
            raise ValueError(f"item {index} has length {length}, but a bin holds 1 to {width}")
    size = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [width] * (2 * size)  # node k has children 2k and 2k+1; bin b is leaf size + b
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= lengths[item] else 2 * node + 1
        if node - size == len(bins):
            bins.append([])
        bins[node - size].append(item)
        room[node] -= lengths[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def pack_tight(groups: Sequence[Sequence[int]], width: int) -> list[list[list[int]]]:
    """Pack each group apart, at the one width at which all their rows have the fewest positions.

    Rows of a batch are as wide as the widest: three rows for two and a bit cost a third more than
    they hold, unless they are narrower. ``width`` is tried first, then up to `WIDTHS` multiples of
    `MULTIPLE` from the longest item on, until at most `SPARE` is left over.

    Returns:
        For each group its bins, as of `pack`.
    """
    longest = max((length for lengths in groups for length in lengths), default=1)
    first, last = (rounded(end) // MULTIPLE for end in (longest, width))
    enough = (1 + SPARE) * sum(map(sum, groups))
    best: tuple[int, list[list[list[int]]]] | None = None
    for tried in (last, *range(first, last, max(1, -(-(last - first) // WIDTHS)))):
        packed = [pack(lengths, min(tried * MULTIPLE, width)) for lengths in groups]
        positions = tried * MULTIPLE * sum(map(len, packed))
        if best is None or positions < best[0]:
            best = positions, packed
        if positions <= enough:
            break
    assert best is not None
    return best[1]


def rounded(length: int) -> int:
    """Up to a multiple of `MULTIPLE`."""
    return -(-length // MULTIPLE) * MULTIPLE


def by_length(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Batches of items, one to a row and padded to the longest, of at most ``limit`` positions.

    Lengths count rounded up to `MULTIPLE`. Items of like length go together, the longest first: no
    dealing needs fewer batches. An item that is longer than the limit is alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches, start = [], 0
    while start < len(order):
        end = start + max(1, limit // rounded(lengths[order[start]]))
        batches.append(order[start:end])
        start = end
    return batches


def deal_by_length(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """So many batches `by_length`, the largest of which has as few positions as can be.

    Returns:
        For each batch the indices of its items; the last ones may have none.
    """
    longest = rounded(max(lengths, default=0))
    limits = range(longest, longest * len(lengths) + 1)
    enough = bisect_left(limits, True, key=lambda limit: len(by_length(lengths, limit)) <= parts)
    batches = by_length(lengths, limits[enough]) if lengths else []
    return batches + [[] for _ in range(parts - len(batches))]


def collate(bins: Sequence[Sequence[PackedRow]], *, pad_token_id: int) -> MicroBatch:
    """Lay each bin of documents end to end in one row of tensors.

    W is the longest row, rounded up to a multiple of `MULTIPLE`. What is left of a row is
    padding: a document of its own, so that no real token sees it, with no target and no role. A
    bin without documents is a row of padding.
    """
    import torch

    if not bins:
        raise ValueError("a micro-batch needs at least one row; give an empty bin for padding")
    longest = max(sum(len(row.input_ids) for row in documents) for documents in bins)
    W = rounded(max(1, longest))
    input_ids = torch.full((len(bins), W), pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORE)
    roles = torch.zeros_like(input_ids)
    for b, documents in enumerate(bins):
        start = 0
        for row in documents:
            end = start + len(row.input_ids)
            ids = torch.as_tensor(row.input_ids, dtype=torch.int64)
            learned = torch.as_tensor(row.loss_mask, dtype=torch.int64)
            input_ids[b, start:end] = ids
            position_ids[b, start:end] = torch.arange(end - start)
            targets[b, start : end - 1] = ids[1:]
            roles[b, start : end - 1] = learned[1:] * int(row.role)
            start = end
        position_ids[b, start:] = torch.arange(W - start)
    return MicroBatch(input_ids=input_ids, position_ids=position_ids, targets=targets, roles=roles)


def keeps_documents_apart(model: Any) -> bool:
    """Whether a causal language model, given packed rows, lets no document see another.

    Found by trying: the logits of a short document behind two others are compared with its logits
    alone. They differ by rounding if it is unaware of the others, so by far less than the square
    root of the precision, relative to their spread. Two rows are tried: with one, transformers'
    flash attention keeps documents apart, with more it does not.
    """
    import torch

    lengths = (5, 1, 7)
    words = torch.arange(sum(lengths)) * 7919 % model.config.get_text_config().vocab_size
    ids = words.to(model.device).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(model.device).expand(2, -1)
    last = slice(-lengths[-1], None)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed, alone = (
                model(input_ids=i, position_ids=p, use_cache=False).logits[0, last].float()
                for i, p in ((ids, positions), (ids[:, last], positions[:, last]))
            )
    finally:
        model.train(training)
    precision = torch.finfo(model.dtype).eps
    return bool((packed - alone).norm() < precision**0.5 * (alone - alone.mean()).norm())
