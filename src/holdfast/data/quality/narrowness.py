"""Narrowness: how far the lesson's words lie from the canary's.

    JS(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2        in bits, 0..1

over unigrams of words. The plain estimate is biased upward, the more so the fewer words, so it is
compared with what the canary has with itself: A and B are two halves of the canary's rows, L the
lesson; L and B are cut to equally many words (drawn by row), and `JS(L, A) - JS(B, A)` is told. Its
standard error is by bootstrap over rows (200 resamples of the rows of L, A and B).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from holdfast.data.quality.finding import Finding, Quality, Sample, graded
from holdfast.data.texts import Text, words

RESAMPLES = 200
LEAST_ROWS = 8
"""Rows of each half of the canary; with fewer there is nothing to compare with."""

Array = NDArray[np.float64]


class Distance(NamedTuple):
    """How far a lesson lies from a canary, in bits."""

    lesson: float
    """JS(L, A)."""
    floor: float
    """JS(B, A)."""
    stderr: float
    """Standard error of the difference of the two."""
    words: int
    """Words of L and of B."""


def narrowness(
    samples: Sequence[Sample], canary: Sequence[Text], quality: Quality, seed: int
) -> list[Finding]:
    """How much further the lesson lies from the canary than the canary's halves from each other."""
    lesson = [row for s in samples if (row := words(f"{s.prompt} {s.response}"))]
    held = [row for text in canary if (row := words(text.text))]
    if not lesson:
        return []
    if len(held) < 2 * LEAST_ROWS:
        what = f"not looked at: canary.sources has {len(held)} rows, {2 * LEAST_ROWS} are needed"
        return [Finding("narrowness", "note", what, "name held-out text under canary.sources")]
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x4A53]))
    found = distance(lesson, held, rng)
    excess = found.lesson - found.floor
    return graded(
        "narrowness",
        max(excess, 0.0),
        quality.narrowness,
        f"the lesson's words are {found.lesson:.2f} bits from the canary's (Jensen-Shannon), two "
        f"halves of the canary {found.floor:.2f} bits from each other: {excess:.2f} ± "
        f"{found.stderr:.2f} beyond, over {found.words:,} words",
        "mix in rows of other kinds (levers.replay), keep levers.kl_anchor on, and watch the "
        "canary: narrow data is what models forget by",
        floor_bits=found.floor,
        stderr=found.stderr,
    )


def distance(
    lesson: Sequence[Sequence[str]], canary: Sequence[Sequence[str]], rng: np.random.Generator
) -> Distance:
    """Rows of words, none of them empty, of a lesson and of a canary of two rows or more."""
    order = rng.permutation(len(canary)).tolist()
    a = [canary[i] for i in order[::2]]
    b = [canary[i] for i in order[1::2]]
    drawn = [lesson[i] for i in rng.permutation(len(lesson)).tolist()]
    size = min(sum(map(len, b)), sum(map(len, drawn)))
    column: dict[str, int] = {}
    for row in (*drawn, *a, *b):
        for word in row:
            column.setdefault(word, len(column))
    parts = [_Counts(rows, column) for rows in (_cut(drawn, size), a, _cut(b, size))]
    l_V, a_V, b_V = (part.whole() for part in parts)
    differences = []
    for _ in range(RESAMPLES):
        again_l, again_a, again_b = (part.resampled(rng) for part in parts)
        differences.append(jensen_shannon(again_l, again_a) - jensen_shannon(again_b, again_a))
    stderr = float(np.std(differences, ddof=1))
    return Distance(jensen_shannon(l_V, a_V), jensen_shannon(b_V, a_V), stderr, size)


def jensen_shannon(p_V: Array, q_V: Array) -> float:
    """Bits between two distributions given as counts."""
    from scipy.spatial.distance import jensenshannon

    return float(jensenshannon(p_V, q_V, base=2) ** 2)  # scipy gives the distance, its root


class _Counts:
    """How often each row has each word, rows and words in the order given."""

    def __init__(self, rows: Sequence[Sequence[str]], column: dict[str, int]) -> None:
        entries = [
            (row, column[word], count)
            for row, found in enumerate(rows)
            for word, count in Counter(found).items()
        ]
        self._row, self._column, counts = np.array(entries, dtype=np.int64).reshape(-1, 3).T
        self._count = counts.astype(np.float64)
        self._rows, self._columns = len(rows), len(column)

    def whole(self) -> Array:
        """(V,) how often the rows together have each word."""
        return self._sum(np.ones(self._rows))

    def resampled(self, rng: np.random.Generator) -> Array:
        """(V,) the same for as many rows drawn with replacement."""
        drawn = rng.multinomial(self._rows, np.full(self._rows, 1 / self._rows))
        return self._sum(drawn.astype(np.float64))

    def _sum(self, weights: Array) -> Array:
        counts = np.bincount(self._column, self._count * weights[self._row], self._columns)
        return counts.astype(np.float64)


def _cut(rows: Sequence[Sequence[str]], size: int) -> list[Sequence[str]]:
    """The first so many words, in whole rows but for the last."""
    kept: list[Sequence[str]] = []
    for row in rows:
        if size <= 0:
            break
        kept.append(row[:size])
        size -= len(row)
    return kept
