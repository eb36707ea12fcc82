"""Documents that are too long: what is kept of them."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Cut(NamedTuple):
    """A document of at most ``max_length`` tokens, and what it lost."""

    input_ids: list[int]
    loss_mask: list[bool]
    prompt: bool
    """Whether the prompt lost its beginning."""
    response: bool
    """Whether the response lost its end."""


def cut(input_ids: list[int], loss_mask: list[bool], max_length: int, bos: int | None) -> Cut:
    """Shorten a document so that it still teaches something.

    The end is cut off where that leaves the first response half of ``max_length``, or as much as
    it has if that is less. Otherwise the prompt loses its beginning (a BOS stays), so that it does.

    Args:
        input_ids: (n,) the document.
        loss_mask: (n,) True on response tokens, at least one of them.
        max_length: at least 2, so that a prompt token and a response token fit.
        bos: the token that must stay first if it stands there.
    """
    if len(input_ids) <= max_length:
        return Cut(input_ids, loss_mask, prompt=False, response=False)
    first = loss_mask.index(True)
    room = min(len(input_ids) - first, max_length // 2)
    if first + room <= max_length:
        lost = any(loss_mask[max_length:])
        return Cut(input_ids[:max_length], loss_mask[:max_length], prompt=False, response=lost)
    kept = max_length - room
    prompt = input_ids[first - kept : first]
    if input_ids[0] == bos:
        prompt[0] = input_ids[0]
    return Cut(
        prompt + input_ids[first : first + room],
        [False] * kept + loss_mask[first : first + room],
        prompt=True,
        response=any(loss_mask[first + room :]),
    )


def split(input_ids: list[int], width: int) -> list[list[int]]:
    """Pieces of at most ``width`` tokens, as even as can be, so that no piece is a stub."""
    pieces = -(-len(input_ids) // width)
    bounds = [piece * len(input_ids) // pieces for piece in range(pieces + 1)]
    return [input_ids[low:high] for low, high in pairwise(bounds)]
