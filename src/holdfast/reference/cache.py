"""The base's probabilities from a folder that was written once: training needs no second model.

    cache.json            what the cache was made from, and every part with its checksums
    part-00000.parquet    one row a document, its columns as in `encoding`; a row group is a block
    data/                 the rows that the base wrote itself, for training to read

A document is found by its content (blake2b-128 of its token ids), so that nothing needs to be known
of streams or packing. A file is read through a memory map, a block at a time; the checksum of the
block's bytes is compared before they are decoded, so that damage is named and never trained on.

Shape suffixes: B rows, W positions in a row, M positions that need the base, E listed entries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.errors import RequestError
from holdfast.files import write_text
from holdfast.reference.documents import key_of, packed
from holdfast.reference.encoding import COLUMNS, Array, Read, Settings, decode

if TYPE_CHECKING:
    import torch

    from holdfast.objective import SparseBase

VERSION = 3
"""Raise it when an older folder could not be read, or would be read as something else."""
MANIFEST = "cache.json"
BLOCKS_KEPT = 64
"""Blocks of about 16k positions that stay decompressed; 64 are some 50 MB."""


@dataclass(frozen=True)
class Identity:
    """What a cache was made from; it serves nothing else."""

    weights: str
    """SHA-256 of the base's weights (`model.hash_weights`) and of its config."""
    tokenizer: str
    """SHA-256 of vocabulary, merges and special tokens."""
    template: str
    """SHA-256 of the chat template."""
    temperature: float = 1.0

    @classmethod
    def of(cls, model: Any, tokenizer: Any, temperature: float = 1.0) -> Identity:
        """The identity of a base (before an adapter is added) with its tokenizer."""
        from holdfast import model as models
        from holdfast.data.fingerprint import of_tokenizer

        parts = of_tokenizer(tokenizer)
        template = parts.pop("template")
        digests = [
            hashlib.sha256(json.dumps(part, sort_keys=True).encode("utf-8", "surrogatepass"))
            for part in (parts, template)
        ]
        hexes = [digest.hexdigest() for digest in digests]
        base = json.dumps([models.hash_weights(model), models.plain_config(model)], default=str)
        return cls(hashlib.sha256(base.encode()).hexdigest(), hexes[0], hexes[1], temperature)

    def problems(self, asked: Identity, folder: Path) -> list[str]:
        """Why the cache of this identity cannot serve the one asked for; a line each."""
        words = {
            "weights": "model weights or config",
            "tokenizer": "tokenizer",
            "template": "chat template",
            "temperature": "temperature",
        }
        return [
            f"cache '{folder}': its {words[name]} ({_short(mine)}) are not the run's "
            f"({_short(theirs)}); give what it was built from, or build it anew: "
            "holdfast cache build RECIPE --out another-folder"
            for name, mine in asdict(self).items()
            if mine != (theirs := getattr(asked, name))
        ]


@dataclass(frozen=True)
class Manifest:
    """What `cache.json` says."""

    identity: Identity
    settings: Settings
    documents: int
    """In the whole row set, over all shards."""
    positions: int
    rows: str
    """Hash of the row set."""
    shard: tuple[int, int]
    """i of n; 1 of 1 is a whole cache."""
    parts: dict[str, dict[str, Any]]
    """By file: bytes, footer (its length and checksum), blocks (offset, length, checksum)."""

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder. Raises RequestError where there is none, or it is damaged."""
        file = folder / MANIFEST
        if not file.is_file():
            raise RequestError(
                f"cache '{folder}': there is no {MANIFEST} in it; give the folder that was --out "
                "of a finished: holdfast cache build"
            )
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["checksum"] != _checksum(found):
                raise ValueError("checksum")
        except (ValueError, KeyError, TypeError):
            raise RequestError(
                f"cache '{folder}': {MANIFEST} is damaged; run the same holdfast cache build "
                "again: it checks the parts that are there and writes only the manifest"
            ) from None
        if found["version"] != VERSION:
            raise RequestError(
                f"cache '{folder}': has format {found['version']}, this holdfast reads {VERSION}; "
                "build it anew with: holdfast cache build"
            )
        names = {field.name for field in fields(cls)}
        values = {name: value for name, value in found.items() if name in names}
        values["identity"] = Identity(**values["identity"])
        values["settings"] = Settings(**values["settings"])
        values["shard"] = tuple(values["shard"])
        return cls(**values)

    def write(self, folder: Path) -> None:
        """Write it whole or not at all."""
        record = {"version": VERSION, **asdict(self)}
        record["checksum"] = _checksum(record)
        write_text(folder / MANIFEST, json.dumps(record, indent=1))


READ_AS = {
    "counts": np.int64,
    "ids": np.int64,
    "logp": np.float32,
    "weights": np.float32,
    "log_tail": np.float32,
}


class Part:
    """One file of a cache, memory-mapped; everything in it is checked before it is used."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.blocks = path, record["blocks"]
        if not path.is_file():
            raise self.damaged("is missing")
        if (size := path.stat().st_size) != record["bytes"]:
            raise self.damaged(f"has {size:,} bytes instead of {record['bytes']:,}")
        self.bytes = np.memmap(path, np.uint8, "r")
        start, checksum = record["footer"]
        if bytes(self.bytes[:4]) != b"PAR1" or zlib.crc32(self.bytes[start:].data) != checksum:
            raise self.damaged("has a damaged footer")
        self.file = pq.ParquetFile(pa.memory_map(str(path)), page_checksum_verification=True)
        self.order = _unpack_order(self.file.metadata.metadata[b"order"])

    def damaged(self, how: str) -> RequestError:
        """What to say of a file that is not as it was written."""
        return RequestError(
            f"cache: '{self.path}' {how}; delete this file and run the same holdfast cache build "
            "again, which computes only what is missing"
        )

    def read(self, block: int, columns: Sequence[str]) -> Any:
        """Columns of a block as an Arrow table, after its bytes were found to be as written."""
        offset, length, checksum = self.blocks[block]
        if zlib.crc32(self.bytes[offset : offset + length].data) != checksum:
            raise self.damaged(f"is damaged in block {block}")
        return self._table(block, columns)

    def keys(self) -> list[Any]:
        """The documents of each block; only this column's pages are read and checked."""
        return [self._table(i, ["document"])["document"] for i in range(len(self.blocks))]

    def _table(self, block: int, columns: Sequence[str]) -> Any:
        import pyarrow as pa

        try:
            return self.file.read_row_group(block, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self.damaged(f"is damaged in block {block}") from error


class Cached:
    """Reference that reads the base's distribution from a folder; see the module's page."""

    reads_rows = False

    def __init__(self, folder: Path, manifest: Manifest, tokenizer: Any = None) -> None:
        self.folder, self.manifest, self.tokenizer = folder, manifest, tokenizer
        self.parts = [Part(folder / name, record) for name, record in manifest.parts.items()]
        blocks = [
            (part, block, keys) for part in self.parts for block, keys in enumerate(part.keys())
        ]
        self._places = np.array(
            [(b, i) for b, (_, _, keys) in enumerate(blocks) for i in range(len(keys))], np.int64
        ).reshape(-1, 2)
        self._blocks = [(part, block) for part, block, _ in blocks]
        content = b"".join(_raw(keys) for _, _, keys in blocks)
        keys_D2 = np.frombuffer(content, ">u8").reshape(-1, 2)
        by_key = np.argsort(keys_D2[:, 0], kind="stable")
        self._keys, self._places = keys_D2[by_key], self._places[by_key]
        self._kept: OrderedDict[int, dict[str, tuple[Array, Array]]] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path, identity: Identity, tokenizer: Any = None) -> Cached:
        """The cache in a folder, for a run with this identity.

        Args:
            tokenizer: to name a row that is not in it by its text instead of its ids.

        Raises:
            RequestError: it is not whole, damaged, or made from something else; says which.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.shard != (1, 1):
            i, n = manifest.shard
            raise RequestError(
                f"cache '{folder}': is shard {i} of {n}; join them first: "
                "holdfast cache merge --out whole SHARD..."
            )
        if problems := manifest.identity.problems(identity, folder):
            raise RequestError(*problems)
        return cls(folder, manifest, tokenizer)

    def view(
        self, input_ids_BW: torch.Tensor, position_ids_BW: torch.Tensor, kl_BW: torch.Tensor
    ) -> SparseBase:
        """The base at the positions where `kl_BW` is True, in row-major order.

        Raises:
            RequestError: a row is not in the cache, or what is stored of it is damaged.
        """
        import torch

        from holdfast.objective import SparseBase

        found = [
            self.document(ids, wanted)
            for ids, wanted in packed(
                input_ids_BW.cpu().numpy(), position_ids_BW.cpu().numpy(), kl_BW.cpu().numpy()
            )
        ]
        read = Read(
            *(
                np.concatenate([np.empty(0, kind), *(getattr(one, name) for one in found)])
                for name, kind in READ_AS.items()
            )
        )
        offsets = np.concatenate([[0], np.cumsum(read.counts)])
        arrays = {"offsets": offsets, "ids": read.ids, "logp": read.logp, "log_tail": read.log_tail}
        if self.manifest.settings.draws:
            arrays["weights"] = read.weights
        device = kl_BW.device
        return SparseBase(**{name: torch.from_numpy(a).to(device) for name, a in arrays.items()})

    def document(self, ids: Array, wanted: Array) -> Read:
        """The base at the positions of one document that are wanted.

        Args:
            ids: (n,) its tokens.
            wanted: (n,) True where the base is asked for; never at the last token.
        """
        place = self._find(ids)
        if place is None:
            raise RequestError(self._missing(ids))
        block, row = place
        part, _ = self._blocks[block]
        columns = {}
        for name, (offsets, values) in self._block(block).items():
            columns[name] = values[offsets[row] : offsets[row + 1]]
        chosen = wanted[:-1]
        inside = {
            "position": chosen,
            "entry": np.repeat(chosen, columns["counts"]),
            "draw": np.repeat(chosen, columns["draws"]),
        }
        picked = {name: columns[name][inside[kind]] for name, kind in COLUMNS.items()}
        return decode(picked, ids[1:][chosen], part.order, self.manifest.settings)

    def require(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise RequestError where rows are not in the cache; before training begins."""
        missing = [row for row in rows if self._find(np.asarray(row)) is None]
        if missing:
            raise RequestError(f"{self._missing(missing[0])} (one of {len(missing):,} such rows)")

    def _find(self, ids: Array) -> tuple[int, int] | None:
        high, low = np.frombuffer(key_of(ids), ">u8")
        i = int(np.searchsorted(self._keys[:, 0], high))
        while i < len(self._keys) and self._keys[i, 0] == high:
            if self._keys[i, 1] == low:
                return int(self._places[i, 0]), int(self._places[i, 1])
            i += 1
        return None

    def _missing(self, ids: Array | Sequence[int]) -> str:
        first = [int(token) for token in ids[:12]]
        start = f"ids {', '.join(map(str, first))}"
        if self.tokenizer is not None:
            start = repr(self.tokenizer.decode(first))
        return (
            f"cache '{self.folder}': a row of {len(ids)} tokens that begins with {start} is "
            "not in it; build it from this run's recipe: holdfast cache build RECIPE --out "
            "another-folder"
        )

    def _block(self, index: int) -> dict[str, tuple[Array, Array]]:
        """Offsets and values of a block's columns, kept for the documents beside this one."""
        if index not in self._kept:
            part, block = self._blocks[index]
            table = part.read(block, list(COLUMNS))
            self._kept[index] = {name: _lists(table[name]) for name in COLUMNS}
            if len(self._kept) > BLOCKS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(index)
        return self._kept[index]


@dataclass(frozen=True)
class Checked:
    """What `check` found: every byte is as it was written."""

    documents: int
    positions: int
    entries: int
    """Listed tokens, the next ones included."""
    draws: int
    """Tokens drawn from the tails."""
    bytes: int
    """Of the parts and the manifest."""

    def as_dict(self) -> dict[str, Any]:
        """The same, and what a reader wants to know of it."""
        positions = max(1, self.positions)
        return {
            **asdict(self),
            "bytes_a_token": self.bytes / positions,
            "entries_a_position": self.entries / positions,
            "draws_a_position": self.draws / positions,
        }


def check(folder: Path) -> Checked:
    """Read every byte of a cache (or a shard) and hold it against the checksums.

    Raises:
        RequestError: every damaged file, a line each.
    """
    manifest = Manifest.read(folder)
    problems: list[str] = []
    documents = positions = entries = draws = 0
    for name, record in manifest.parts.items():
        try:
            part = Part(folder / name, record)
            for block in range(len(part.blocks)):
                table = part.read(block, ["document", *COLUMNS])
                counts = _lists(table["counts"])[1]
                documents += len(table)
                positions += len(counts)
                entries += int(counts.sum(dtype=np.int64)) + len(counts)
                draws += int(_lists(table["draws"])[1].sum(dtype=np.int64))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(*problems)
    size = sum(record["bytes"] for record in manifest.parts.values())
    size += (folder / MANIFEST).stat().st_size
    return Checked(documents, positions, entries, draws, size)


def describe(path: Path) -> dict[str, Any]:
    """A part's record for the manifest; its pages are checked against their own checksums."""
    import pyarrow.parquet as pq

    size = path.stat().st_size
    file = pq.ParquetFile(path, page_checksum_verification=True)
    content = np.memmap(path, np.uint8, "r")
    blocks = []
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        chunks = [group.column(i) for i in range(group.num_columns)]
        start = min(chunk.data_page_offset for chunk in chunks)
        length = sum(chunk.total_compressed_size for chunk in chunks)
        file.read_row_group(index)
        blocks.append([start, length, zlib.crc32(content[start : start + length].data)])
    footer = sum(blocks[-1][:2])
    return {"bytes": size, "footer": [footer, zlib.crc32(content[footer:].data)], "blocks": blocks}


def _lists(column: Any) -> tuple[Array, Array]:
    """Offsets and flat values of a list column."""
    lists = column.combine_chunks()
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def _raw(keys: Any) -> bytes:
    """The bytes of a column of document keys, end to end."""
    return b"".join(keys.to_pylist())


def pack_order(order: Array) -> bytes:
    """Token ids as text for a file's metadata: low and high bytes apart, so that they compress."""
    planes = order.astype("<u4").view(np.uint8).reshape(-1, 4).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9))


def _unpack_order(packed: bytes) -> Array:
    planes = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8).reshape(4, -1)
    return np.ascontiguousarray(planes.T).view("<u4").reshape(-1)


def _checksum(record: dict[str, Any]) -> str:
    kept = {name: value for name, value in record.items() if name != "checksum"}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _short(value: Any) -> str:
    return value[:8] if isinstance(value, str) else f"{value:g}"
