"""Canary: cross-entropy on held-out text of the base's kind, by domain; never trained on.

Where the user has no such text, the base writes it before training. The mean rise on the base's
own samples is then an unbiased estimate of KL(base || tuned) per token.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from holdfast.data.rows import Source
from holdfast.gate.stats import stderr_of_mean
from holdfast.meters import Reading, Split
from holdfast.meters.scoring import Scored, mean_nlls
from holdfast.section import Section


class Canary(Section):
    """Held-out text that must stay as likely as before."""

    sources: list[Source] = Field(default_factory=list)
    """Files with `text` rows (or chat rows), a domain each; empty: samples of the base."""
    max_documents: int = Field(default=200, ge=8)
    """Documents a domain. Half of them are the selection split, half the sealed one."""


@dataclass(frozen=True)
class Document:
    """One held-out text."""

    id: str
    domain: str
    text: Scored
    cluster: str
    """Windows cut from one document share its cluster."""

    @property
    def split(self) -> Split:
        """A pure function of the cluster: the same document is always in the same split."""
        digest = hashlib.sha256(f"split:{self.cluster}".encode()).digest()
        return "sealed" if digest[0] % 2 else "selection"


def document(ids: list[int], mask: list[bool], domain: str, cluster: str = "") -> Document:
    """Build a Document whose id is the hash of its tokens."""
    name = hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
    return Document(name, domain, Scored(ids, mask), cluster or name)


def read_canary(
    model: Any, documents: Sequence[Document], split: Split, step: int, *, meter: str = "canary"
) -> list[Reading]:
    """One reading a domain: the mean over documents of nats a token, and its standard error."""
    started = time.perf_counter()
    chosen = [d for d in documents if d.split == split]
    by_domain: dict[str, list[tuple[Document, float]]] = defaultdict(list)
    for doc, nll in zip(chosen, mean_nlls(model, [d.text for d in chosen]), strict=True):
        by_domain[doc.domain].append((doc, nll))
    seconds = time.perf_counter() - started
    return [
        Reading(
            meter=meter,
            name=domain,
            split=split,
            step=step,
            value=sum(nll for _, nll in pairs) / len(pairs),
            stderr=stderr_of_mean([nll for _, nll in pairs], [d.cluster for d, _ in pairs]),
            n=len(pairs),
            unit="nats",
            seconds=seconds * len(pairs) / len(chosen),
            tags=("canary",) if meter == "canary" else ("target",),
            items={d.id: nll for d, nll in pairs},
            clusters={d.id: d.cluster for d, _ in pairs},
        )
        for domain, pairs in sorted(by_domain.items())
    ]
