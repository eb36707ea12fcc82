"""The lab's corpus: an endless, seeded stream of documents of known proportions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random
from typing import Literal, NamedTuple

from holdfast.lab.generators import DOMAINS
from holdfast.lab.heldout import is_canary

Split = Literal["train", "canary"]

_PIECES = re.compile(r" ?[^\W\d_]+|\d| ?[^\w\s]+|_|\s+(?=\S)")


class Document(NamedTuple):
    """One document and the domain it is of."""

    text: str
    domain: str


def documents(domain: str, seed: int, split: Split) -> Iterator[Document]:
    """Write documents of one domain without end, all of one split."""
    rng = Random(f"{domain}/{split}/{seed}")
    while True:
        text = DOMAINS[domain].document(rng)
        if is_canary(text) == (split == "canary"):
            yield Document(text, domain)


def corpus(seed: int, split: Split) -> Iterator[Document]:
    """Write documents of all domains without end, in the proportions the domains declare.

    Each next document is of the domain that is furthest behind its share, so the proportions
    hold for every beginning of the stream and not only in the long run.
    """
    streams = {name: documents(name, seed, split) for name in DOMAINS}
    written = dict.fromkeys(DOMAINS, 0)
    while True:
        name = min(DOMAINS, key=lambda name: written[name] / DOMAINS[name].share)
        document = next(streams[name])
        written[name] += size(document.text)
        yield document


def size(text: str) -> int:
    """Count the words, digits and signs of a text: close to its tokens, without a tokenizer."""
    return sum(1 for _ in _PIECES.finditer(text)) + 2
