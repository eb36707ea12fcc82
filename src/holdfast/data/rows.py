"""What the user's files say: sources, their rows, and every problem in them at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from holdfast.data.readers import (
    Malformed,
    Record,
    files_of,
    is_saved,
    local_path,
    read_file,
    read_hub,
    read_saved,
)
from holdfast.data.row_checks import RowFormat, characters, formats_of, ignored_keys, row_problems
from holdfast.errors import RequestError
from holdfast.section import Section

__all__ = [
    "Row",
    "RowFormat",
    "RowSummary",
    "Source",
    "Unsound",
    "check_rows",
    "iter_rows",
    "read_rows",
]


def _or_a_path(schema: dict[str, Any]) -> None:
    """In the JSON schema, too, a plain path may stand for a source."""
    whole = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string", "description": "The same as `path` alone."}, whole]


class Source(Section):
    """Where rows come from. A plain string stands for a source with that ``path``."""

    model_config = ConfigDict(json_schema_extra=_or_a_path)

    path: str = Field(min_length=1)
    """A .jsonl, .json or .parquet file, a folder of such files, a folder written by
    ``datasets.save_to_disk``, or the id of a dataset on the Hugging Face hub."""
    split: str = "train"
    """Which split of a folder or a hub dataset; a single file has only ``train``."""
    name: str | None = None
    """The configuration of a hub dataset (``main``, ``wikitext-2-raw-v1``); null elsewhere."""
    domain: str | None = None
    """What kind of data this is (``code``, ``spanish``); a row's own ``domain`` comes first."""
    proportion: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """This source's share among its neighbours, relative to theirs; null: by its tokens."""
    limit: int | None = Field(default=None, ge=1)
    """Read only the first so many rows; null reads all."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Row:
    """One sound row of a source, not yet tokenized."""

    where: str
    """Where it stands, for messages: "lessons.jsonl line 12", "train.parquet row 3"."""
    content: dict[str, Any]
    """The row as it was written."""
    format: RowFormat
    domain: str | None = None


@dataclass(frozen=True)
class Unsound:
    """One row that cannot be used."""

    where: str
    problems: tuple[str, ...]
    """What is wrong with it, and how to mend it."""


@dataclass(frozen=True)
class RowSummary:
    """What a sound source holds."""

    rows: int
    format: RowFormat
    domains: dict[str, int]
    """Rows by domain; rows of no domain are not counted here."""
    characters: int
    """Characters of text in all rows."""
    ignored: tuple[str, ...] = ()
    """Keys that the rows have and holdfast does not read (an id, a licence), sorted."""


def iter_rows(source: Source) -> Iterator[Row]:
    """The rows of a source, one by one; a RequestError names the first unsound one."""
    for row in read_rows(source, need_response=False):
        if isinstance(row, Unsound):
            raise RequestError(*(f"{row.where}: {problem}" for problem in row.problems))
        yield row


def read_rows(source: Source, *, need_response: bool) -> Iterator[Row | Unsound]:
    """The rows of a source, one by one, sound or not; see `check_rows` for `need_response`."""
    for where, record in _records(source):
        if problems := _problems(record, need_response=need_response):
            yield Unsound(where, tuple(problems))
            continue
        assert isinstance(record, dict)
        yield Row(where, record, formats_of(record)[0], record.get("domain") or source.domain)


def check_rows(
    source: Source,
    *,
    need_response: bool,
    max_problems: int = 20,
    max_rows: int | None = None,
) -> RowSummary:
    """Read a source and say what it holds, or raise a RequestError with every problem in it.

    Args:
        source: what to read.
        need_response: whether a row with nothing to learn is a problem (task data) or will be
            left out and counted (replay, canary).
        max_problems: name so many problems one by one; the others are counted.
        max_rows: read no further than this; None reads all.
    """
    if max_rows is not None:
        limit = max_rows if source.limit is None else min(source.limit, max_rows)
        source = source.model_copy(update={"limit": limit})
    tally = _Tally()
    for where, record in _records(source):
        problems = _problems(record, need_response=need_response)
        tally.problems += [f"{where}: {p}" for p in problems][: max_problems - len(tally.problems)]
        tally.found += len(problems)
        tally.rows += 1
        if not problems:
            assert isinstance(record, dict)
            tally.count(where, record, source.domain)
    problems = list(tally.problems)
    if tally.found > len(problems):
        problems.append(f"{source.path}: and {tally.found - len(problems)} more problems")
    if len(tally.first) > 1:
        found = ", ".join(f"{name} (first at {where})" for name, where in tally.first.items())
        problems.append(f"{source.path}: mixes formats: {found}; keep one format in one source")
    if not tally.rows:
        problems.append(
            f"{source.path}: has no rows; "
            'write one object a line, such as {"prompt": "2+2=", "completion": "4"}'
        )
    if problems:
        raise RequestError(*problems)
    (row_format,) = tally.first
    return RowSummary(
        rows=tally.rows,
        format=row_format,
        domains=dict(tally.domains),
        characters=tally.characters,
        ignored=tuple(sorted(tally.ignored)),
    )


@dataclass
class _Tally:
    """What `check_rows` has seen so far."""

    rows: int = 0
    found: int = 0
    problems: list[str] = field(default_factory=list)
    first: dict[RowFormat, str] = field(default_factory=dict)
    domains: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    ignored: set[str] = field(default_factory=set)

    def count(self, where: str, row: dict[str, Any], domain: str | None) -> None:
        """Add one sound row."""
        self.first.setdefault(formats_of(row)[0], where)
        if name := row.get("domain") or domain:
            self.domains[name] += 1
        self.characters += characters(row)
        self.ignored |= ignored_keys(row)


def _problems(record: object, *, need_response: bool) -> list[str]:
    if isinstance(record, Malformed):
        return [record.problem]
    return list(row_problems(record, need_response=need_response))


def _records(source: Source) -> Iterator[Record]:
    """Every record of the source, sound or not, up to its limit."""
    return islice(_all_records(source), source.limit)


def _all_records(source: Source) -> Iterator[Record]:
    local = local_path(source.path)
    if local is None:
        few = source.limit is not None
        yield from read_hub(source.path, source.name, source.split, streaming=few)
        return
    if source.name is not None:
        raise RequestError(
            f"{source.path}: 'name' is {source.name!r}, but only hub datasets have "
            "configurations; remove it"
        )
    if local.is_file():
        if source.split != "train":
            raise RequestError(
                f"{source.path}: 'split' is {source.split!r}, but a single file has no splits; "
                "remove it"
            )
        yield from read_file(local, source.path)
    elif is_saved(local):
        yield from read_saved(local, source.split)
    else:
        for file in files_of(local, source.split):
            yield from read_file(file, str(file))
