"""Canary: cross-entropy on held-out text of the base's kind, by domain; never trained on.

Where the user has no such text, the base writes it before training. The mean rise on the base's
own samples is then an unbiased estimate of KL(base || tuned) per token (`kl.py` has it exact).

Bits per byte are bits of the predicted tokens over the bytes of the text that they decode to, so
they can be compared where tokenizers differ. The end token costs bits and has no bytes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from holdfast.data.rows import Source
from holdfast.errors import RequestError
from holdfast.gate.stats import stderr_of_mean
from holdfast.meters import Reading, Split, half_of
from holdfast.meters.scoring import Scored, mean_nlls
from holdfast.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_SAMPLES = "base samples"
"""Domain of the text that the base wrote itself."""


class Canary(Section):
    """Held-out text that must stay as likely as before."""

    sources: list[Source] = Field(default_factory=list)
    """Files with `text` rows (or chat rows), a domain each; empty: those of the run that the model
    came from, else samples of the base."""
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
        return half_of(self.cluster)


def document(ids: list[int], mask: list[bool], domain: str, cluster: str = "") -> Document:
    """Build a Document whose id is the hash of its tokens."""
    name = hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
    return Document(name, domain, Scored(ids, mask), cluster or name)


def in_turn(documents: Sequence[Document], number: int, most: int) -> list[Document]:
    """At most `most` of each domain's selection half: the `number`-th part, round and round."""
    by_domain: dict[str, list[Document]] = defaultdict(list)
    for one in documents:
        if one.split == "selection":
            by_domain[one.domain].append(one)
    return [
        mine[(number * most + i) % len(mine)]
        for mine in by_domain.values()
        for i in range(min(most, len(mine)))
    ]


def read_canary(
    model: Any, documents: Sequence[Document], split: Split, step: int, *, meter: str = "canary"
) -> list[Reading]:
    """One reading a domain: the mean over windows of nats a token, and its standard error."""
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


def mean_loss(readings: Sequence[Reading]) -> float:
    """Mean over domains of the canary's selection half, nats a token; 0 where there is none."""
    found = [
        r.value for r in readings if (r.meter, r.split, r.unit) == ("canary", "selection", "nats")
    ]
    return sum(found) / len(found) if found else 0.0


def read_bits(
    readings: Sequence[Reading],
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Reading]:
    """What `read_canary` read, in bits per byte.

    An item is a whole document (a cluster), so that two models whose tokenizers cut it otherwise
    can be compared pair by pair: bits of all its windows over their bytes.

    Args:
        readings: in nats; others are passed over.
        documents: what was read; more of them do no harm.
        tokenizer: the model's own.
    """
    by_id = {(d.domain, d.id): d for d in documents}
    found = []
    for reading in readings:
        if reading.unit != "nats":
            continue
        bits: dict[str, float] = defaultdict(float)
        whole: dict[str, Scored] = defaultdict(lambda: Scored([], []))
        for key, nats in reading.items.items():
            text, cluster = by_id[reading.name, key].text, by_id[reading.name, key].cluster
            bits[cluster] += nats * sum(text.loss_mask[1:]) / math.log(2)
            # window after window: one alone may begin within a character
            mask = [False, *text.loss_mask[1:]]
            before = whole[cluster]
            whole[cluster] = Scored(before.input_ids + text.input_ids, before.loss_mask + mask)
        size = {cluster: predicted_bytes(text, tokenizer) for cluster, text in whole.items()}
        items = {cluster: bits[cluster] / size[cluster] for cluster in bits if size[cluster]}
        if items:
            found.append(
                Reading(
                    meter=f"{reading.meter}_bits",
                    name=reading.name,
                    split=reading.split,
                    step=reading.step,
                    value=sum(items.values()) / len(items),
                    stderr=stderr_of_mean(list(items.values())),
                    n=len(items),
                    unit="bits per byte",
                    items=items,
                )
            )
    return found


def predicted_bytes(text: Scored, tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes (UTF-8) of the text that the scored tokens add to what stands before them."""

    def upto(stop: int) -> int:
        decoded: str = tokenizer.decode(
            text.input_ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return len(decoded.encode())

    mask = [False, *text.loss_mask[1:], False]
    # where the mask turns on or off; on ones come first
    turns = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    return sum(
        upto(stop) - upto(start) for start, stop in zip(turns[::2], turns[1::2], strict=True)
    )


def read_rise(before: Sequence[Reading], after: Sequence[Reading]) -> list[Reading]:
    """How much each domain rose: the mean paired rise over the mean before, and its error.

    Error by the delta method for a ratio of paired means, clustered as the readings are. An item is
    its own rise over the mean before. For the base's own samples there are also the estimate of
    KL(base || tuned) in nats a token, and the tuned model's perplexity.

    Raises:
        RequestError: a domain was read on other documents before than after.
    """
    then = {(r.meter, r.name, r.split): r for r in before}
    found = []
    for now in after:
        base = then.get((now.meter, now.name, now.split))
        if base is None or not base.items:
            continue
        if base.items.keys() != now.items.keys():
            raise RequestError(
                f"{now.meter}: '{now.name}' was read on {len(base.items)} documents before and on "
                f"{len(now.items)} after, not on the same ones; read both models on one file"
            )
        clusters = [now.clusters.get(i, i) for i in now.items]
        rises = {i: value - base.items[i] for i, value in now.items.items()}
        mean = math.fsum(base.items.values()) / len(rises)
        ratio = math.fsum(rises.values()) / len(rises) / mean if mean else math.nan
        rest = [(rise - ratio * base.items[i]) / mean if mean else math.nan
                for i, rise in rises.items()]  # fmt: skip
        found.append(
            _beside(
                now,
                "rise",
                ratio,
                stderr_of_mean(rest, clusters),
                "relative",
                {i: rise / mean if mean else math.nan for i, rise in rises.items()},
            )
        )
        if now.name == OWN_SAMPLES and now.unit == "nats":
            found += _of_own_samples(now, rises, clusters)
    return found


def _of_own_samples(now: Reading, rises: dict[str, float], clusters: list[str]) -> list[Reading]:
    values = list(rises.values())
    kl = math.fsum(values) / len(values)
    perplexity = _exp(now.value)
    stderr = None if now.stderr is None else perplexity * now.stderr
    return [
        _beside(now, "kl", kl, stderr_of_mean(values, clusters), "nats", rises),
        _beside(now, "perplexity", perplexity, stderr, "perplexity", {}),
    ]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _beside(
    now: Reading,
    what: str,
    value: float,
    stderr: float | None,
    unit: str,
    items: dict[str, float],
) -> Reading:
    """Another reading of the same documents; no gate judges it, for it has no tag."""
    return Reading(
        meter=f"{now.meter}_{what}",
        name=now.name,
        split=now.split,
        step=now.step,
        value=value,
        stderr=stderr,
        n=now.n,
        unit=unit,
        items=items,
        clusters=now.clusters,
    )
