"""What `holdfast show-batch` shows: the rows of one step, and which of their tokens are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from holdfast.data.example import Role
from holdfast.errors import RequestError
from holdfast.prepare import Prepared


@dataclass(frozen=True)
class BatchRow:
    """One document of a step."""

    stream: str
    row: int
    """Its number in the stream."""
    ids: list[int]
    tokens: list[str]
    roles: list[str]
    """What predicting each token is for: task, replay, anchor, or none."""
    pieces: list[tuple[str, bool]]
    """The text in pieces of the same kind, and whether they are trained."""


def rows_of_step(prepared: Prepared, step: int, blank: str = "") -> list[BatchRow]:
    """The documents of one optimizer step, stream by stream.

    Args:
        prepared: the run before its first step.
        step: from 0.
        blank: a stream that has no text to show.
    """
    if step >= prepared.steps:
        raise RequestError(
            f"--step: {step} is beyond the run's {prepared.steps} steps; "
            f"give 0 to {prepared.steps - 1}"
        )
    return [
        _row(prepared, index, row)
        for index, row in prepared.mixture.rows_at(step)
        if prepared.streams[index].name != blank
    ]


def as_records(rows: Sequence[BatchRow]) -> list[dict[str, Any]]:
    """The rows as plain values: ids, tokens and roles side by side."""
    return [
        {
            "stream": row.stream,
            "row": row.row,
            "ids": row.ids,
            "tokens": row.tokens,
            "roles": row.roles,
            "text": "".join(text for text, _ in row.pieces),
        }
        for row in rows
    ]


def print_rows(rows: Sequence[BatchRow], console: Console) -> None:
    """The rows as text: what is trained is bright, the rest dim."""
    for row in rows:
        trained = sum(role != "none" for role in row.roles)
        title = f"{row.stream} row {row.row}: {len(row.ids)} tokens, {trained} trained"
        console.rule(Text(title), align="left")
        text = Text()
        for piece, bright in row.pieces:
            text.append(piece, style="bold green" if bright else "dim")
        console.print(text, soft_wrap=True)


def _row(prepared: Prepared, index: int, row: int) -> BatchRow:
    stream = prepared.streams[index]
    ids, mask = stream.fetch(row)
    return BatchRow(
        stream.name,
        row,
        list(ids),
        prepared.tokenizer.convert_ids_to_tokens(list(ids)),
        [(stream.role if trained else Role.NONE).name.lower() for trained in mask],
        list(_pieces(prepared.tokenizer, ids, mask)),
    )


def _pieces(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> Iterator[tuple[str, bool]]:
    """Text of each run of tokens with one mask: what the run adds to the text before it."""
    end, before = 0, ""
    for trained, run in groupby(mask):
        end += len(list(run))
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        yield text[len(before) :], trained
        before = text
