"""Experts: where a mixture of experts sends its tokens, against where the base sent them.

Narrow data overwrites a few experts thoroughly, unseen until traffic reaches them. So for each
domain and each layer with a router:

    share_e = part of the domain's routed slots (tokens x top-k) that went to expert e
    pair_ef = part of its tokens' pairs of experts that were e and f (co-activation)
    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, in nats, at most ln 2; p the base's, q the tuned

JS has the standard error of a bootstrap over documents, the same ones for both models.

Shape suffixes: E experts of a layer, G documents, R bootstrap replicates.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from holdfast.errors import RequestError
from holdfast.gate.stats import stderr_of_mean
from holdfast.meters import Reading, Split
from holdfast.meters.routing import Counts, Routing, layer_of

if TYPE_CHECKING:
    from holdfast.meters.drift import Start

_APART = re.compile(r"(.*)\.experts\.(\d+)\.")
"""Names of the tensors of experts that are modules of their own."""
REPLICATES = 200
"""Bootstrap replicates behind a standard error."""
BUSY = 2.0
"""An expert is busy with the lesson from this many times an even share of its tokens on."""
SHIFTS = 10
"""Changes of a single expert's share that are told, by domain."""
UNREACHED = 0.25
"""No probe reaches an expert that gets less than this part of an even share of their tokens."""

Row = tuple[str, float, float | None, dict[str, float]]
"""Name, value, standard error and items of a reading."""


def read_experts(before: Routing, after: Routing, step: int, seed: int = 0) -> list[Reading]:
    """How a model's routing differs from its base's on the same documents, by domain.

    routing            JS of the shares: `DOMAIN` (mean over layers) and `DOMAIN/LAYER`
    coactivation       the same of pairs, where a token has two experts or more
    routing_changed    share of tokens whose set of experts is another one; mean over layers
    routing_shift      the `SHIFTS` largest changes of a share, tuned less base: `DOMAIN/LAYER/E`

    Raises:
        RequestError: the two are not of one architecture, or not on the same documents.
    """
    if (before.layers, before.experts) != (after.layers, after.experts) or (
        [d.id for d in before.documents] != [d.id for d in after.documents]
    ):
        raise RequestError(
            "experts: base and tuned model were read on other documents, or do not have the same "
            "layers and experts; read both with the same canary and tokenizer"
        )
    found = []
    for domain in sorted({d.domain for d in before.documents}):
        documents = [d for d in before.documents if d.domain == domain]
        weights_RG = _resampled([d.cluster for d in documents], seed)
        made: dict[str, tuple[str, list[Row]]] = {
            **{
                meter: ("nats", [*_compared(meter, domain, before, after, weights_RG)])
                for meter in ("routing", "coactivation")
            },
            "routing_changed": ("share", [*_changed(domain, before, after)]),
            "routing_shift": ("share", [*_shifts(domain, before, after, weights_RG)]),
        }
        seconds = after.seconds * len(documents) / len(after.documents)
        count = sum(len(rows) for _, rows in made.values())
        for meter, (unit, rows) in made.items():
            for name, value, stderr, items in rows:
                found.append(
                    Reading(
                        meter=meter,
                        name=name,
                        split=documents[0].split,
                        step=step,
                        value=value,
                        stderr=stderr,
                        n=len(documents),
                        unit=unit,
                        seconds=seconds / count,
                        items=items,
                        clusters={d.id: d.cluster for d in documents} if items else {},
                    )
                )
    return found


def _compared(
    meter: str, domain: str, before: Routing, after: Routing, weights_RG: Counts
) -> Iterator[Row]:
    """JS of each layer and their mean, with the bootstrap's error."""
    every, by_layer = [], []
    for number, layer in enumerate(before.layers):
        how = Routing.counts if meter == "routing" else Routing.pair_counts
        base_GE, tuned_GE = how(before, number, domain), how(after, number, domain)
        if not base_GE.sum():
            return  # one expert a token: no pairs
        used = (base_GE.sum(0) + tuned_GE.sum(0)) > 0
        base_GE, tuned_GE = base_GE[:, used], tuned_GE[:, used]
        value = float(jensen_shannon(base_GE.sum(0), tuned_GE.sum(0)))
        replicates_R = jensen_shannon(weights_RG @ base_GE, weights_RG @ tuned_GE)
        every.append((value, replicates_R))
        by_layer.append((f"{domain}/{layer}", value, _spread(replicates_R), dict[str, float]()))
    mean_R = np.mean([replicates_R for _, replicates_R in every], axis=0)
    yield domain, float(np.mean([value for value, _ in every])), _spread(mean_R), {}
    yield from by_layer


def _changed(domain: str, before: Routing, after: Routing) -> Iterator[Row]:
    """Of each document: the mean over layers of the share of tokens with another set of experts."""
    items: dict[str, float] = {}
    clusters = []
    for document, then, now in zip(before.documents, before.chosen, after.chosen, strict=True):
        if document.domain == domain and len(then[0]):
            other = [(a != b).any(1).mean() for a, b in zip(then, now, strict=True)]
            items[document.id] = float(np.mean(other))
            clusters.append(document.cluster)
    if items:
        values = list(items.values())
        yield domain, sum(values) / len(values), stderr_of_mean(values, clusters), items


def _shifts(domain: str, before: Routing, after: Routing, weights_RG: Counts) -> Iterator[Row]:
    """The experts whose share changed most over all layers, the largest change first."""
    found: list[Row] = []
    for number, layer in enumerate(before.layers):
        base_GE, tuned_GE = (r.counts(number, domain) for r in (before, after))
        slots_G = base_GE.sum(1)  # as many in both: the same tokens, the same top-k
        shift_E = (tuned_GE - base_GE).sum(0) / slots_G.sum()
        replicates_RE = weights_RG @ (tuned_GE - base_GE) / (weights_RG @ slots_G)[:, None]
        found += [
            (f"{domain}/{layer}/{expert}", float(shift_E[expert]),
             _spread(replicates_RE[:, expert]), {})
            for expert in np.flatnonzero(shift_E)
        ]  # fmt: skip
    yield from sorted(found, key=lambda row: -abs(row[1]))[:SHIFTS]


def jensen_shannon(p: Counts, q: Counts) -> Counts:
    """JS in nats of counts (..., E), whatever they sum to."""
    from scipy.special import entr

    p, q = (x / np.maximum(x.sum(-1, keepdims=True), 1e-300) for x in (p, q))
    between: Counts = entr((p + q) / 2).sum(-1) - (entr(p).sum(-1) + entr(q).sum(-1)) / 2
    return np.maximum(between, 0.0)


def _resampled(clusters: Sequence[str], seed: int) -> Counts:
    """How often each document (G) is drawn in each replicate (R): whole clusters at a time.

    No replicates of a single cluster: it says nothing of its like.
    """
    names = list(dict.fromkeys(clusters))
    if len(names) < 2:
        return np.empty((0, len(clusters)))
    random = np.random.default_rng(np.random.SeedSequence([seed, 0xE4]))
    even = np.full(len(names), 1 / len(names))
    drawn = random.multinomial(len(names), even, REPLICATES).astype(np.float64)
    place = {name: i for i, name in enumerate(names)}
    return drawn[:, [place[cluster] for cluster in clusters]]


def _spread(replicates_R: Counts) -> float:
    return float(np.std(replicates_R, ddof=1)) if len(replicates_R) else math.nan


def read_busiest(lesson: Routing, step: int) -> list[Reading]:
    """Which experts got most of the lesson's tokens, as `expert_load` of `LAYER/EXPERT`.

    By layer the fewest experts that together took more than half of its slots, each with its share
    (and the error of a share that differs between documents); and as `experts_in_use` of `LAYER`
    the effective number of experts, exp of the shares' entropy.
    """
    from scipy.special import entr

    split: Split = lesson.documents[0].split if lesson.documents else "train"
    clusters = [d.cluster for d in lesson.documents]
    found = []
    for number, layer in enumerate(lesson.layers):
        counts_GE = lesson.counts(number)
        total = counts_GE.sum()
        if not total:
            continue
        share_E = counts_GE.sum(0) / total
        in_use = math.exp(float(entr(share_E).sum()))
        found.append(
            Reading("experts_in_use", layer, split, step, in_use, None, len(counts_GE), "experts")
        )
        mean = total / len(counts_GE)
        for expert in _most(share_E):
            share = float(share_E[expert])
            rest = (counts_GE[:, expert] - share * counts_GE.sum(1)) / mean  # of a ratio of means
            stderr = stderr_of_mean(rest.tolist(), clusters)
            found.append(
                Reading(
                    meter="expert_load",
                    name=f"{layer}/{expert}",
                    split=split,
                    step=step,
                    value=share,
                    stderr=stderr,
                    n=len(counts_GE),
                    unit="share",
                )
            )
    return found


def _most(share_E: Counts) -> list[int]:
    """The fewest experts that take more than half, the busiest first."""
    order = np.argsort(-share_E, kind="stable")
    count = int(np.searchsorted(np.cumsum(share_E[order]), 0.5, side="right")) + 1
    return [int(expert) for expert in order[:count]]


def read_expert_drift(start: Start, step: int) -> list[Reading]:
    """Relative displacement of each expert, over all its matrices: `expert_drift` of `LAYER/E`."""
    return [
        Reading("expert_drift", f"{layer}/{expert}", "train", step, value, None, 1, "relative")
        for layer, values in expert_drift(start).items()
        for expert, value in enumerate(values)
    ]


def expert_drift(start: Start) -> dict[str, list[float]]:
    """||W - W0|| / ||W0|| of each expert of each layer, whether they share a parameter or not."""
    squares: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0]))

    def add(layer: str, expert: int, moved: float, began: float) -> None:
        square = squares[layer][expert]
        square[0] += moved**2
        square[1] += began**2

    for name, (moved_E, start_E) in start.experts().items():
        layer = layer_of(layer_of(name))
        for expert, pair in enumerate(zip(moved_E.tolist(), start_E.tolist(), strict=True)):
            add(layer, expert, *pair)
    apart = start.displacement()
    for name, moved in apart.change.items():
        if found := _APART.match(name):
            add(layer_of(f"{found[1]}.experts"), int(found[2]), moved, apart.start[name])
    return {
        layer: [math.sqrt(moved / began) if began else 0.0
                for _, (moved, began) in sorted(experts.items())]
        for layer, experts in squares.items()
    }  # fmt: skip


def unseen_experts(
    lesson: Routing, watched: Routing, drift: Mapping[str, Sequence[float]] | None = None
) -> list[str]:
    """A warning for each layer where the lesson overwrites few experts and no probe reaches some.

    An expert is named if the lesson sends it `BUSY` times an even share of its tokens, all that is
    watched (canary and probes) less than `UNREACHED` of an even share, and, where `drift` is given,
    it moved further than the layer's experts do on average (a layer not in it did not move).
    """
    found = []
    seen = watched.shares()
    for layer, share_E in lesson.shares().items():
        even, far = 1 / len(share_E), np.ones(len(share_E), dtype=bool)
        if drift is not None:
            moved = np.asarray(drift.get(layer, np.zeros(len(share_E))))
            far = moved > moved.mean()
        watched_E = seen.get(layer, np.zeros(len(share_E)))
        unseen = (share_E >= BUSY * even) & (watched_E < UNREACHED * even) & far
        if unseen.any():
            told = ", ".join(
                f"{expert} ({share_E[expert]:.0%} of the lesson's tokens, {watched_E[expert]:.1%} "
                "of the probes')"
                for expert in np.flatnonzero(unseen)
            )
            found.append(
                f"experts: the lesson overwrites few experts of '{layer}', and no probe or canary "
                f"text reaches these: {told}; what they knew is not measured: add probes or canary "
                "text of other domains, or freeze the experts"
            )
    return found
