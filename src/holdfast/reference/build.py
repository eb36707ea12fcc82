"""Building a cache of the base's probabilities: in parts, resumable, in shards that are merged.

Rows are sorted by length and cut into parts, which depends on the rows alone. Shard i of n computes
every n-th part; where there are fewer parts than shards, some have nothing to do. A part is written
under a temporary name and renamed, so one that is there is whole and is not computed again.

Shape suffixes: B rows, W positions in a row, C positions of one chunk, H hidden size, V vocabulary,
K most entries a position.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast import model as models
from holdfast.errors import RequestError
from holdfast.files import full_disk_named
from holdfast.reference.cache import (
    VERSION,
    Identity,
    Manifest,
    describe,
    pack_order,
)
from holdfast.reference.documents import batches, by_length, hidden_of, key_of
from holdfast.reference.encoding import COLUMNS, Array, Settings, Stored, encode, frequent_first

if TYPE_CHECKING:
    import torch

    from holdfast.objective import Head

PART_POSITIONS = 1 << 20
"""Positions of one file, about 20 MB: what an interrupted build loses at most."""
BLOCK_POSITIONS = 1 << 14
"""Positions of one row group: what is read to get at one document."""
CHUNK_BYTES = 64 * 2**20
"""Upper size of one chunk's fp32 logits."""
COMPRESSION_LEVEL = 12
SPLIT = "BYTE_STREAM_SPLIT"
"""The four bytes that Parquet gives any number lie apart: the high ones, mostly 0, cost nothing."""

Progress = Callable[[int, int], None]
"""Called with the positions done and those of the whole shard."""


def build(
    model: Any,
    rows: Iterable[Sequence[int]],
    folder: Path,
    identity: Identity,
    settings: Settings,
    *,
    shard: tuple[int, int] = (1, 1),
    progress: Progress = lambda _done, _all: None,
) -> Manifest:
    """Compute what is missing of the cache of `rows` in `folder`, then write its manifest.

    Args:
        model: the base; it is read in eval mode.
        rows: token ids of each document; the same document twice is stored once.
        shard: i of n, from 1; the others are built in folders of their own.

    Raises:
        RequestError: the folder holds parts of another cache.
    """
    documents = by_length(rows)
    if not documents:
        raise RequestError("cache: there is no row to store; give data whose rows have a response")
    digest = hashlib.blake2b(b"".join(sorted(documents)), digest_size=16).hexdigest()
    positions = sum(len(row) - 1 for row in documents.values())
    manifest = Manifest(identity, settings, len(documents), positions, digest, shard, {})
    parts = dict(_parts(list(documents.values())))
    mine = list(parts)[shard[0] - 1 :: shard[1]]
    with full_disk_named(folder / "part"):
        folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder, manifest)
    total = sum(_positions(parts[name]) for name in mine)
    done = 0
    for name in mine:
        path, key = folder / name, _part_key(manifest, name)
        record = _whole(path, key, known.get(name))
        if record is None:
            further = partial(_further, progress, done, total)
            columns = _columns(model, parts[name], settings, further)
            _write_part(path, parts[name], columns, settings, key)
            record = describe(path)
        manifest.parts[name] = record
        done += _positions(parts[name])
        progress(done, total)
    manifest.write(folder)
    return manifest


def merge(shards: Sequence[Path], out: Path) -> Manifest:
    """Move the parts of all shards into one folder and write its manifest. May be run again.

    Raises:
        RequestError: a shard is missing, given twice, or of another model or row set.
    """
    found = [(folder, Manifest.read(folder)) for folder in shards]
    if not found:
        raise RequestError("cache merge: give the folders of all shards")
    first_folder, first = found[0]
    problems: list[str] = []
    places: dict[int, Path] = {}
    for folder, manifest in found:
        i, n = manifest.shard
        if not _same(manifest, first):
            problems += manifest.identity.problems(first.identity, folder) or [
                f"cache merge: '{folder}' and '{first_folder}' have different rows, settings or "
                "numbers of shards; build all from one recipe with the same n"
            ]
        elif i in places:
            problems.append(
                f"cache merge: '{folder}' and '{places[i]}' are both shard {i}/{n}; give each once"
            )
        places.setdefault(i, folder)
    n = first.shard[1]
    if not problems and (missing := sorted(set(range(1, n + 1)) - set(places))):
        numbers = ", ".join(f"{i}/{n}" for i in missing)
        problems.append(
            f"cache merge: shard {numbers} is missing; build it with --shard {missing[0]}/{n}"
        )
    if problems:
        raise RequestError(*problems)
    parts = {name: record for _, manifest in found for name, record in manifest.parts.items()}
    with full_disk_named(out / "part"):
        out.mkdir(parents=True, exist_ok=True)
        for folder, manifest in found:
            for name in manifest.parts:
                if (folder / name).is_file():  # else an interrupted merge has moved it already
                    shutil.move(folder / name, out / name)
        if (data := first_folder / "data").is_dir() and not (out / "data").exists():
            shutil.copytree(data, out / "data")
    whole = replace(first, shard=(1, 1), parts=dict(sorted(parts.items())))
    whole.write(out)
    return whole


def _same(one: Manifest, other: Manifest) -> bool:
    return replace(one, parts={}, shard=(1, one.shard[1])) == replace(
        other, parts={}, shard=(1, other.shard[1])
    )


def _parts(documents: Sequence[Array]) -> Iterator[tuple[str, list[Array]]]:
    """File names and their documents: the next part begins where one is full."""
    part: list[Array] = []
    number = positions = 0
    for document in documents:
        part.append(document)
        positions += len(document) - 1
        if positions >= PART_POSITIONS:
            yield f"part-{number:05d}.parquet", part
            part, number, positions = [], number + 1, 0
    if part:
        yield f"part-{number:05d}.parquet", part


def _positions(documents: Sequence[Array]) -> int:
    return sum(map(len, documents)) - len(documents)


def _part_key(manifest: Manifest, name: str) -> str:
    """What a part was made from, kept in the file: only such a part is taken over."""
    inputs = [VERSION, asdict(manifest.identity), asdict(manifest.settings), manifest.rows, name]
    return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


def _known(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The parts of an earlier manifest of the same cache, by file."""
    try:
        before = Manifest.read(folder)
    except RequestError:
        return {}
    return before.parts if _same(before, manifest) else {}


def _whole(path: Path, key: str, known: dict[str, Any] | None) -> dict[str, Any] | None:
    """The record of a part that is there and as it was written; None where it has to be made."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        found = pq.read_metadata(path).metadata[b"key"].decode()
        record = describe(path)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    if found != key:
        raise RequestError(
            f"--out: '{path}' is part of another cache; give a folder that does not exist yet"
        )
    return record if known in (None, record) else None


def _further(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _columns(
    model: Any, documents: Sequence[Array], settings: Settings, progress: Callable[[int], None]
) -> tuple[Array, dict[str, Array]]:
    """The order of the tokens, and the encoded columns of a part, document after document."""
    stored: list[Stored] = []
    done = 0
    for batch in batches(documents):
        stored += store_batch(model, batch, settings)
        done += _positions(batch)
        progress(done)
    whole = Stored(
        *(np.concatenate([getattr(one, field.name) for one in stored]) for field in fields(Stored))
    )
    order = frequent_first(np.concatenate([whole.ids, whole.drawn_ids]))
    return order, encode(whole, order, settings)


def store_batch(model: Any, documents: Sequence[Array], settings: Settings) -> list[Stored]:
    """The base's distributions over the documents, one `Stored` a chunk, in reading order."""
    import torch

    hidden_NH = hidden_of(model, documents)
    device = hidden_NH.device
    next_N = torch.from_numpy(np.concatenate([document[1:] for document in documents]))
    start_N = torch.cat([torch.from_numpy(_uniform(document)) for document in documents])
    next_N, start_N, head = next_N.long().to(device), start_N.to(device), models.head(model)
    chunk = max(1, CHUNK_BYTES // (4 * head.weight_VH.shape[0]))
    with torch.no_grad():
        return [
            store_chunk(hidden_NH[rows], head, next_N[rows], start_N[rows], settings)
            for i in range(0, len(hidden_NH), chunk)
            for rows in [slice(i, i + chunk)]
        ]


def store_chunk(
    hidden_CH: torch.Tensor,
    head: Head,
    next_C: torch.Tensor,
    start_C: torch.Tensor,
    settings: Settings,
) -> Stored:
    """The entries that are listed (see `encoding`), the next token, and what is drawn of the rest.

    Args:
        start_C: uniform in [0, 1): where each position's systematic draw begins.
    """
    import torch

    outside = float("-inf")
    logp_CV = (head(hidden_CH).float() / settings.temperature).log_softmax(-1)
    most = max(settings.max_entries, settings.draws)
    top_CK, ids_CK = logp_CV.topk(min(most, logp_CV.shape[1]))
    p_CK = top_CK.exp()
    before_CK = p_CK.cumsum(-1) - p_CK
    before_CK[:, settings.max_entries :] = 1
    # what would be drawn for certain is listed instead: it costs less and has no noise
    listed_CK = (before_CK < settings.mass) | (settings.draws * p_CK > 1)
    next_C1 = next_C.unsqueeze(1)
    next_logp_C = logp_CV.gather(1, next_C1).squeeze(1)
    # an entry that is not listed is written over itself, so that no other mask is needed
    logp_CV.scatter_(1, ids_CK, top_CK.masked_fill(listed_CK, outside))
    logp_CV.scatter_(1, next_C1, outside)
    log_tail_C = torch.logsumexp(logp_CV, -1)
    listed_CK &= ids_CK != next_C1
    drawn_CV = _draw(logp_CV, start_C, settings.draws)
    found = (
        listed_CK.sum(-1),
        ids_CK[listed_CK],
        top_CK[listed_CK],
        next_logp_C,
        log_tail_C,
        drawn_CV.sum(-1),
        drawn_CV.nonzero()[:, 1],
        logp_CV[drawn_CV],
    )
    return Stored(*(tensor.cpu().numpy() for tensor in found))


def _draw(logp_CV: torch.Tensor, start_C: torch.Tensor, draws: int) -> torch.Tensor:
    """Which tokens (C, V) are drawn, each with probability min(1, draws p).

    Systematic sampling (Madow 1949): the tokens lie end to end on a line, each as long as its
    probability, and whoever covers one of the points start, start + 1, ... is drawn.
    """
    import torch

    pi_CV = (logp_CV.double().exp() * draws).clamp_(max=1)
    ends_CV = pi_CV.cumsum(-1) + start_C.unsqueeze(1)
    points_CV = ends_CV.floor()
    # the end of one token is the start of the next, to the last bit
    before_CV = torch.cat([start_C.floor().unsqueeze(1), points_CV[:, :-1]], 1)
    return (points_CV > before_CV) & (pi_CV > 0)


def _uniform(document: Array) -> Array:
    """(n - 1,) numbers in [0, 1) that depend on the document alone."""
    seed = int.from_bytes(key_of(document), "big")
    return np.random.default_rng(seed).random(len(document) - 1)


def _write_part(
    path: Path,
    documents: Sequence[Array],
    columns: tuple[Array, dict[str, Array]],
    settings: Settings,
    key: str,
) -> None:
    """A Parquet file: one row a document, blocks of about `BLOCK_POSITIONS` as row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    order, values = columns
    lists = {
        name: pa.list_(pa.field("element", pa.from_numpy_dtype(array.dtype), nullable=False))
        for name, array in values.items()
    }
    schema = pa.schema(
        [
            pa.field("document", pa.binary(16), nullable=False),
            *(pa.field(name, kind, nullable=False) for name, kind in lists.items()),
        ]
    )
    by_position = np.concatenate([[0], np.cumsum([len(d) - 1 for d in documents])])
    ends = {"position": by_position} | {
        kind: np.concatenate([[0], np.cumsum(values[name], dtype=np.int64)])[by_position]
        for kind, name in (("entry", "counts"), ("draw", "draws"))
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with full_disk_named(path):
        try:
            with pq.ParquetWriter(
                temporary,
                schema,
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                data_page_size=1 << 30,
                store_schema=False,
                column_encoding={
                    "document": "PLAIN",
                    **{f"{name}.list.element": SPLIT for name in lists},
                },
            ) as writer:
                for first, last in _blocks(by_position):
                    rows = {"document": pa.array(map(key_of, documents[first:last]), pa.binary(16))}
                    for name, array in values.items():
                        bounds = ends[COLUMNS[name]][first : last + 1]
                        flat = pa.array(array[bounds[0] : bounds[-1]])
                        offsets = pa.array((bounds - bounds[0]).astype(np.int32))
                        rows[name] = pa.ListArray.from_arrays(offsets, flat, type=lists[name])
                    writer.write_table(pa.table(rows, schema=schema))
                # not in the Arrow schema, which would be stored a second time
                writer.add_key_value_metadata({"key": key, "order": pack_order(order)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _blocks(by_position: Array) -> Iterator[tuple[int, int]]:
    """First and last document of each block."""
    first = 0
    for last in range(1, len(by_position)):
        full = by_position[last] - by_position[first] >= BLOCK_POSITIONS
        if full or last == len(by_position) - 1:
            yield first, last
            first = last
