"""Near-duplicates: rows whose word 5-grams are the same but for a few (Lee et al. 2022, NearDup).

Exact, without hashing tricks: two sets of Jaccard similarity t or more share at least one of the
first `|A| - ceil(t |A|) + 1` members of each, in any common order (Bayardo et al. 2007). Ordered
from the rarest on, that prefix meets few other rows. A row of fewer than five words is one 5-gram,
so that such rows are duplicates only where they are the same.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from holdfast.data.quality.finding import Finding, Quality, Sample, graded
from holdfast.data.texts import words

GRAM = 5


def near_duplicates(samples: Sequence[Sample], quality: Quality) -> list[Finding]:
    """Rows that repeat an earlier one."""
    texts = [words(f"{sample.prompt} {sample.response}") for sample in samples]
    twins = earlier_twins(texts, quality.near_duplicate)
    if not twins:
        return []
    exact = sum(texts[row] == texts[first] for row, first in twins.items())
    pairs = [f"{samples[row].where} (like {samples[first].where})" for row, first in twins.items()]
    share = len(twins) / len(samples)
    return graded(
        "near-duplicates",
        share,
        quality.duplicates,
        f"{len(twins)} rows ({share:.1%}) repeat an earlier one, {exact} of them word for word",
        "delete those that were not meant to be there; a row given twice is learned twice",
        pairs,
        exact=exact,
    )


def earlier_twins(texts: Sequence[Sequence[str]], least: float) -> dict[int, int]:
    """Row -> an earlier row that it is at least so similar to (Jaccard of word 5-grams).

    Of rows that are alike the first stands for all: a row is compared with rows that repeat none.
    """
    sets = [frozenset(_grams(text)) for text in texts]
    counts = Counter(gram for grams in sets for gram in grams)
    firsts: dict[frozenset[tuple[str, ...]], int] = {}
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    twins: dict[int, int] = {}
    for row, grams in enumerate(sets):
        if not grams:
            continue
        if grams in firsts:
            twins[row] = firsts[grams]
            continue
        firsts[grams] = row
        ordered = sorted(grams, key=lambda gram: (counts[gram], gram))
        shared = math.ceil(least * len(grams) - 1e-9)  # least * len is not always exact
        prefix = ordered[: len(grams) - shared + 1]
        candidates = sorted({other for gram in prefix for other in holders[gram]})
        twin = next((c for c in candidates if _jaccard(sets[c], grams) >= least), None)
        if twin is None:
            for gram in prefix:
                holders[gram].append(row)
        else:
            twins[row] = twin
    return twins


def _grams(text: Sequence[str]) -> list[tuple[str, ...]]:
    if not text:
        return []
    return [tuple(text[i : i + GRAM]) for i in range(max(1, len(text) - GRAM + 1))]


def _jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
