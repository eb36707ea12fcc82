"""Label collapse: does a tuned classifier still tell its labels apart, or say one most of the time?

Read on held-out rows of the lesson. A prediction is the likeliest of the lesson's labels after the
row's prompt, by the log-likelihood of the whole label (its end token included, so that they compare
as probabilities). With m the label that is predicted most often:

    majority_share = P(predicted = m)      and the same label's share in the truth
    excess         = P(predicted = m) - P(true = m), paired row by row; 0 where nothing collapsed
    entropy        = -sum_l p_l log p_l of the predicted labels, in nats, and of the true ones

Errors: of the mean over rows; of the entropy, by the delta method, that of the mean of -log p_l(i).
As m is chosen for being the most frequent, the excess of a sound classifier is a little above 0.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.errors import RequestError
from holdfast.gate.stats import stderr_of_mean
from holdfast.meters import Reading, Split
from holdfast.meters.canary import Document
from holdfast.meters.scoring import Scored, mean_nlls

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_LABELS = 32
"""A lesson with more different responses is no classification."""
ROWS_A_LABEL = 4
"""Nor is one with fewer rows than this for each of them."""

Label = tuple[int, ...]


def labels_of(texts: Iterable[Scored]) -> list[Label]:
    """The lesson's labels (their tokens), the most frequent first; empty if it does not classify.

    A lesson classifies if its responses are few and come again: at least two, at most
    `MOST_LABELS`, `ROWS_A_LABEL` rows or more for each.
    """
    counts = Counter(_label(text) for text in texts)
    few = 2 <= len(counts) <= MOST_LABELS
    return [label for label, _ in counts.most_common()] if few and (
        counts.total() >= ROWS_A_LABEL * len(counts)
    ) else []  # fmt: skip


def read_collapse(
    model: Any,
    documents: Sequence[Document],
    labels: Sequence[Label],
    split: Split,
    step: int,
) -> list[Reading]:
    """`majority_share`, `excess` and `entropy` of the predictions, the first and last of the truth.

    Args:
        documents: held-out rows of the lesson, whose response is one of the labels.
        labels: see `labels_of`, over the rows that are trained on.

    Raises:
        RequestError: fewer than two labels, or a row's response is none of them.
    """
    started = time.perf_counter()
    chosen = [d for d in documents if d.split == split]
    if len(labels) < 2:
        raise RequestError(
            "collapse: the lesson's rows have fewer than 2 labels; this meter is for lessons whose "
            f"responses are 2 to {MOST_LABELS} different ones"
        )
    truth = [_label(d.text) for d in chosen]
    strange = next((d for d, t in zip(chosen, truth, strict=True) if t not in labels), None)
    if strange is not None:
        raise RequestError(
            f"collapse: the response of held-out row '{strange.cluster}' is none of the lesson's "
            f"{len(labels)} labels; leave the row out, or add its label to the lesson"
        )
    if not chosen:
        return []
    predicted = _predicted(model, [d.text for d in chosen], labels)
    clusters = [d.cluster for d in chosen]
    (majority, _), *_ = Counter(predicted).most_common(1)
    says = [float(label == majority) for label in predicted]
    holds = [float(label == majority) for label in truth]
    measured: list[tuple[str, list[float], str]] = [
        ("majority_share", says, "share"),
        ("majority_share_of_truth", holds, "share"),
        ("excess", [a - b for a, b in zip(says, holds, strict=True)], "share"),
        ("entropy", _surprise(predicted), "nats"),
        ("entropy_of_truth", _surprise(truth), "nats"),
    ]
    seconds = time.perf_counter() - started
    return [
        Reading(
            meter="collapse",
            name=name,
            split=split,
            step=step,
            value=math.fsum(values) / len(values),
            stderr=stderr_of_mean(values, clusters),
            n=len(values),
            unit=unit,
            seconds=seconds / len(measured),
            items={d.id: value for d, value in zip(chosen, values, strict=True)},
            clusters={d.id: d.cluster for d in chosen},
        )
        for name, values, unit in measured
    ]


def _predicted(model: Any, texts: Sequence[Scored], labels: Sequence[Label]) -> list[Label]:
    """The likeliest label after each text's prompt."""
    asked = []
    for text in texts:
        prompt = text.input_ids[: _start(text)]
        for label in labels:
            mask = [False] * len(prompt) + [True] * len(label)
            asked.append(Scored([*prompt, *label], mask))
    nlls = iter(mean_nlls(model, asked))
    found = []
    for text in texts:
        scores = [next(nlls) * len(label) for label in labels]
        if not all(map(math.isfinite, scores)):
            raise RequestError(
                "collapse: the model's logits are not numbers (NaN) after a prompt of "
                f"{_start(text)} tokens; check its weights, or set model.dtype to float32"
            )
        found.append(labels[min(range(len(labels)), key=scores.__getitem__)])
    return found


def _surprise(labels: Sequence[Label]) -> list[float]:
    """-log of each label's own share; their mean is the entropy."""
    counts = Counter(labels)
    return [-math.log(counts[label] / len(labels)) for label in labels]


def _start(text: Scored) -> int:
    """Where the response begins: at the first scored token."""
    return next((i for i, on in enumerate(text.loss_mask) if on), len(text.loss_mask))


def _label(text: Scored) -> Label:
    return tuple(text.input_ids[_start(text) :])
