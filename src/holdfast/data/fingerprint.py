"""A name for a set of tokenized rows, by everything that went into them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.data.readers import hub_errors, is_saved, local_path
from holdfast.data.rows import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 2
"""Raise it when the same row would become other tokens, so that no stale cache is read."""


def fingerprint(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> str:
    """A name for what `encode_all` would make of these sources: it changes if any input does.

    It covers the bytes of the files (for a hub dataset the revision), the tokenizer with its
    special tokens and chat template, and ``max_length``; not where the files lie, nor the
    sources' proportions.
    """
    inputs = {
        "version": _VERSION,
        "sources": [of_source(source) for source in sources],
        "tokenizer": of_tokenizer(tokenizer),
        "max_length": max_length,
    }
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Plain values that change if the tokenizer would make other tokens of a text or a chat."""
    if tokenizer.is_fast:
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary.pop("truncation", None)  # the state of the last call, not of the tokenizer
        vocabulary.pop("padding", None)
    else:
        vocabulary = {"class": type(tokenizer).__name__, "tokens": tokenizer.get_vocab()}
    return {
        "vocabulary": vocabulary,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }


def of_source(source: Source) -> dict[str, object]:
    """Plain values that change if what is read of a source does; not if it is moved."""
    settings = source.model_dump(include={"split", "name", "domain", "limit"})
    local = local_path(source.path)
    if local is not None:
        return {**settings, "files": list(_digests(local))}
    from datasets import load_dataset_builder

    with hub_errors(source.path):
        builder = load_dataset_builder(source.path, source.name)
    return {**settings, "hub": source.path, "revision": builder.hash}


def _digests(local: Path) -> Iterator[tuple[str, str]]:
    """The name and hash of a file, or of every file below a folder."""
    if local.is_file():
        files = [local]
    else:
        # What datasets caches inside a saved folder (cache-*.arrow) is not part of it.
        files = [file for file in sorted(local.rglob("*")) if file.is_file()]
        if is_saved(local):
            files = [file for file in files if not file.name.startswith("cache-")]
    for file in files:
        name = file.suffix if local.is_file() else str(file.relative_to(local))
        with file.open("rb") as stream:
            yield name, hashlib.file_digest(stream, "sha256").hexdigest()
