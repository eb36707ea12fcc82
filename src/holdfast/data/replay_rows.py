"""Replay sources as streams: one a domain, each with its own exact share of the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.data.chat import encode_all, fingerprint
from holdfast.data.example import Role
from holdfast.data.rows import Source, iter_rows
from holdfast.data.stream import Stream
from holdfast.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def domain_streams(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    fraction: float,
    role: Role,
    folder: Path,
    *,
    kind: str = "replay",
    shares: Mapping[str, float] | None = None,
) -> tuple[list[Stream], dict[str, Any]]:
    """Tokenize the sources and split `fraction` of the tokens over their domains.

    A domain's share is in proportion to the `proportion` of its sources; sources without one
    count by their tokens, so that, with none given, the corpus is replayed as it is mixed.

    Args:
        sources: rows of any format.
        tokenizer: the model's.
        max_length: longest row in tokens.
        fraction: of each step's tokens, for all of the sources together.
        role: what the loss on their rows is for.
        folder: tokenized rows are kept there.
        kind: what the streams' names begin with, and errors name as levers.replay's setting.
        shares: of each domain, from a mixer file; they sum to one.

    Returns:
        The streams, and for the report what became of the rows of each source.
    """
    field = f"levers.replay.{kind}.sources".replace("replay.replay", "replay")
    domains: dict[str, list[Any]] = {}
    weights: dict[str, float] = {}
    report: dict[str, Any] = {}
    encoded = []
    for source in sources:
        key = fingerprint([source], tokenizer, max_length)
        rows, counts = encode_all(
            iter_rows(source), tokenizer, max_length=max_length, cache_dir=folder, fingerprint=key
        )
        if not counts.tokens:
            raise RequestError(f"{field}: '{source.path}' has no rows to replay")
        report[source.path] = counts.as_dict()
        encoded.append((source, rows, counts.tokens))
    given = [source.proportion is not None for source in sources]
    if any(given) and not all(given):
        missing = sources[given.index(False)].path
        raise RequestError(
            f"{field}: '{missing}' has no proportion but another source has; give "
            "all of them one, such as 1.0, or none"
        )
    for source, rows, tokens in encoded:
        names = [name or Path(source.path).stem for name in rows["domain"]]
        lengths = [len(ids) for ids in rows["input_ids"]]
        weight = tokens if source.proportion is None else source.proportion
        for name in sorted(set(names)):
            chosen = [i for i, other in enumerate(names) if other == name]
            domains.setdefault(name, []).append(rows.select(chosen))
            part = sum(lengths[i] for i in chosen) / tokens
            weights[name] = weights.get(name, 0.0) + weight * part
    from datasets import concatenate_datasets

    if shares is not None and (other := shares.keys() ^ weights.keys()):
        raise RequestError(
            f"levers.replay.mixer: its domains and its rows differ in {', '.join(sorted(other))}; "
            "freeze it again with `holdfast mixer freeze`"
        )
    total = sum(weights.values())
    parts_of = {name: weight / total for name, weight in weights.items()}
    streams = [
        Stream.of(
            f"{kind}/{name}",
            role,
            fraction * (parts_of if shares is None else shares)[name],
            concatenate_datasets(parts),
        )
        for name, parts in sorted(domains.items())
    ]
    return streams, report
