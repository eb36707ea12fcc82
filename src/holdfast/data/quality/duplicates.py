"""Near-duplicates: rows whose word 5-grams are the same but for a few (Lee et al. 2022, NearDup).

Exact, without hashing tricks: two sets of Jaccard similarity t or more share at least one of the
first `|A| - ceil(t |A|) + 1` members of each, in any common order (Bayardo et al. 2007). Ordered
from the rarest on, that prefix meets few other rows, but for a template that most of a row is made
of. Those are passed over without being compared (Xiao et al. 2008, PPJoin): from the first member
that both have, they can share no more than the shorter rest, and the similarity asks for more. Rows
are filed by gram, size and rest, so that one look passes over all that are alike in these.
A row of fewer than five words is one 5-gram, so that such rows are duplicates only where they are
the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from holdfast.data.quality.finding import Finding, Quality, Sample, graded
from holdfast.data.texts import words

GRAM = 5
_INEXACT = 1e-9
"""A product that is a whole number may come out so much above it; rounding up must not see it."""


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
    rows = _ranked(texts)
    firsts: dict[tuple[int, ...], int] = {}
    holders: dict[int, dict[tuple[int, int], list[int]]] = {}
    """Gram -> (size, grams from this one on) -> the rows that have it in their prefix there."""
    twins: dict[int, int] = {}
    for row, grams in enumerate(rows):
        if not grams:
            continue
        if grams in firsts:
            twins[row] = firsts[grams]
            continue
        firsts[grams] = row
        size = len(grams)
        shared = math.ceil(least * size - _INEXACT)
        prefix = grams[: size - shared + 1]
        candidates = {
            other
            for place, gram in enumerate(prefix)
            for (its_size, its_rest), others in holders.get(gram, {}).items()
            if min(size - place, its_rest) >= _least_shared(size, its_size, least)
            for other in others
        }
        members = frozenset(grams)
        twin = next((c for c in sorted(candidates) if _jaccard(members, rows[c]) >= least), None)
        if twin is not None:
            twins[row] = twin
            continue
        for place, gram in enumerate(prefix):
            filed = holders.setdefault(gram, {})
            filed.setdefault((size, size - place), []).append(row)
    return twins


def _ranked(texts: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    """Each text's grams without repeats, by number, in order; the rarest gram has the lowest."""
    numbers: dict[tuple[str, ...], int] = {}
    rows = [{numbers.setdefault(gram, len(numbers)) for gram in _grams(text)} for text in texts]
    counts = Counter(number for row in rows for number in row)
    ranks = {number: rank for rank, number in enumerate(sorted(counts, key=counts.__getitem__))}
    return [tuple(sorted(ranks[number] for number in row)) for row in rows]


def _grams(text: Sequence[str]) -> list[tuple[str, ...]]:
    if not text:
        return []
    return [tuple(text[i : i + GRAM]) for i in range(max(1, len(text) - GRAM + 1))]


def _least_shared(size: int, other: int, least: float) -> int:
    """What two sets of these sizes share if they are so similar: `t / (1 + t) (|A| + |B|)`."""
    return math.ceil(least / (1 + least) * (size + other) - _INEXACT)


def _jaccard(one: frozenset[int], other: Sequence[int]) -> float:
    """Of two sets; the other is given as its members."""
    shared = len(one.intersection(other))
    return shared / (len(one) + len(other) - shared)
