"""Files, folders and hub ids, read record by record, each with the place it stands at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz")
_LINES = (".jsonl", ".json", ".ndjson")
_READABLE = (*_LINES, ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "heldout"),
}


@dataclass(frozen=True)
class Malformed:
    """Stands for a record that could not be read at all."""

    problem: str


Record = tuple[str, object]
"""Where a record stands ("lessons.jsonl line 12"), and what stands there (or `Malformed`)."""


def local_path(path: str) -> Path | None:
    """The file or folder meant by ``path``, or None for a hub id; RequestError if neither."""
    local = Path(path).expanduser()
    if local.suffix.lower() in _PICKLES:
        raise RequestError(
            f"{path}: {local.suffix} files can run code when they are loaded, so they are never "
            "read; save the rows as .jsonl or .parquet"
        )
    if local.is_file() and local.suffix.lower() not in _READABLE:
        raise RequestError(
            f"{path}: cannot read '{local.suffix}' files; allowed: {', '.join(_READABLE)} "
            '(plain text goes into rows such as {"text": "..."})'
        )
    if local.exists():
        return local
    looks_local = local.suffix.lower() in _READABLE or path.startswith((".", "/", "~"))
    if looks_local or not _HUB_ID.fullmatch(path):
        raise RequestError(f"{path}: no such file or folder{_similar(local)}")
    return None


def files_of(folder: Path, split: str) -> list[Path]:
    """The data files of one split in a folder, sorted; what names no split is ``train``."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in _READABLE and file.is_file() and not hidden:
            found.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if not found:
        raise RequestError(
            f"{folder}: no data in this folder; allowed: {', '.join(_READABLE)} files, "
            "or a folder written by datasets.save_to_disk"
        )
    if split not in found:
        raise RequestError(
            f"{folder}: no files of split '{split}'; this folder has {', '.join(sorted(found))}"
        )
    return found[split]


def read_file(file: Path, name: str) -> Iterator[Record]:
    """The records of one .jsonl, .json or .parquet file; ``name`` is how messages call it."""
    if file.suffix.lower() == ".parquet":
        yield from _read_parquet(file, name)
    elif file.suffix.lower() == ".json" and _begins_with_bracket(file):
        yield from _read_array(file, name)
    else:
        yield from _read_lines(file, name)


def is_saved(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote this folder."""
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def read_saved(folder: Path, split: str) -> Iterator[Record]:
    """The records of a folder written by ``datasets.save_to_disk``."""
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(folder))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            hint = did_you_mean(split, map(str, saved))
            raise RequestError(f"{folder}: no split '{split}'; {hint}")
        saved = saved[split]
    yield from _number(saved, str(folder))


def read_hub(repo: str, name: str | None, split: str, *, streaming: bool) -> Iterator[Record]:
    """The records of a dataset on the Hugging Face hub."""
    from datasets import load_dataset

    with hub_errors(repo):
        dataset = load_dataset(repo, name, split=split, streaming=streaming)
    yield from _number(dataset, repo)


class hub_errors:  # noqa: N801 - a context manager, read like a function
    """Turn whatever the hub's client raises into one line that names the dataset."""

    def __init__(self, repo: str) -> None:
        self.repo = repo

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # The client raises OSError, ValueError, requests and httpx errors and its own, by case.
        if isinstance(error, Exception):
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RequestError(
                f"{self.repo}: no such local file or folder{_similar(Path(self.repo))}, and it "
                f"could not be read from the hub ({first}); check the id, 'name' and 'split', "
                "or give a local .jsonl or .parquet path"
            ) from error


def _number(rows: Dataset, name: str) -> Iterator[Record]:
    for index, row in enumerate(rows):
        yield f"{name} row {index}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """What a row does not use is null in a table, at any depth; for us it is not there.

    Arrow has one type for a column: a tool call has every argument that any row's call has.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _read_lines(file: Path, name: str) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{name} line {number}", _parse(line)


def _read_array(file: Path, name: str) -> Iterator[Record]:
    items = _parse(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if not isinstance(items, list):
        yield name, items
        return
    for index, item in enumerate(items):
        yield f"{name} item {index}", item


def _parse(raw: bytes) -> object:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Malformed(f"is not UTF-8 (byte {error.start}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return Malformed(
            f"is not JSON ({error.msg} at character {error.pos + 1}: "
            f"{error.doc[max(error.pos - 20, 0) : error.pos + 20]!r}); "
            'each line must be one object, such as {"prompt": "2+2=", "completion": "4"}'
        )
    except (RecursionError, ValueError) as error:
        return Malformed(f"cannot be read as JSON ({error})")


def _read_parquet(file: Path, name: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        index = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{name} row {index}", _without_nulls(row)
                index += 1
    except pa.ArrowException as error:
        yield name, Malformed(f"is not a readable parquet file ({str(error).splitlines()[0]})")


def _begins_with_bracket(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _split_of(file: Path) -> str:
    """The split a file's own name, or a folder's above it, speaks of; else ``train``."""
    for part in (file.stem, *(folder.name for folder in file.parents)):
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in _SPLIT_WORDS.items():
            if any(word in names for word in words):
                return split
    return "train"


def _similar(missing: Path) -> str:
    """Names in the same folder that look like the one that is not there."""
    folder = missing.parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    close = get_close_matches(missing.name, names, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(str(folder / name)) for name in close)}?)" * bool(
        close
    )
