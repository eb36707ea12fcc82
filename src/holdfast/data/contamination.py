"""Contamination: rows to train on that are also in the canary or in a probe.

What is read as a held-out loss or as a capability must not have been practised on, else a model
that learned it by heart looks as if it had forgotten nothing. Texts are compared as words
(`texts.words`: NFKC, case folded, punctuation and whitespace dropped), in runs of 13, the n-gram
of GPT-3 (Brown et al. 2020, appendix C) and of lm-eval's decontamination. In scripts without
spaces a run is 13 characters: about 8 words, the shortest run that GPT-3 admits.

A row is **contaminated** where

- a secret text shorter than 13 words is the whole row (`texts.folded`: with its inner punctuation,
  for in a short text that may be all that tells "2 + 2 = 4" from "2 * 2 = 4");
- a longer secret text stands whole in the row, or the row, 13 words or longer, in it;
- runs of 13 words that both have cover `CONTAMINATED` of the shorter one, and that one has 26 words
  or more (of less, a single run is most, and the words beside it are what is asked).

For the last, a run that more than `BOILERPLATE` different rows have is passed over: it is a
licence, a prompt template, a stock phrase. This, too, is GPT-3's rule. GPT-3 cut 200 characters
around a single shared run out of its documents; where whole rows are refused, a single run would
refuse a fifth of the rows of a corpus whose held-out part is fair, so it is told (`Overlap`) but
does not contaminate. docs/data-checks.md has the figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from holdfast.data.texts import Text, excerpt, folded, words
from holdfast.errors import RequestError

N = 13
"""Words of a run."""
CONTAMINATED = 0.8
"""Share of the shorter text that shared runs must cover. On the files of docs/data-checks.md
nothing of 26 words or more lies between 0.75 and 0.83, and what lies above are copies."""
BOILERPLATE = 10
"""A run that more different rows than this have says nothing about one of them."""
NAMED = 5
"""Rows that a refusal names; the others it counts."""

Ids = NDArray[np.uint64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """A row, and the secret text that it shares most with."""

    row: str
    """Where the row stands."""
    secret: str
    """Where the secret text stands."""
    share: float
    """Part of the shorter one's words that lies in shared runs, 0..1."""
    matched: str
    """The beginning of what both have."""
    size: int
    """Words of the shorter one."""

    @property
    def contaminated(self) -> bool:
        """Whether the row must not be trained on while the secret text is measured."""
        return self.share == 1 or (self.share >= CONTAMINATED and self.size >= 2 * N)


def refuse_contaminated(rows: Iterable[Text], secrets: Sequence[Text]) -> None:
    """Raise a RequestError that names the rows which are also secret texts, if there are any."""
    found = [o for o in overlaps(rows, secrets) if o.contaminated] if secrets else []
    if not found:
        return
    lines = [
        f"{o.row}: is also in {o.secret} ({o.share:.0%} in common: '{o.matched}'); delete the row, "
        "or take the other out of what is measured"
        for o in found[:NAMED]
    ]
    if len(found) > NAMED:
        lines.append(
            f"and {len(found) - NAMED} more rows that are also in the canary or a probe; "
            "`holdfast check-data` names all of them"
        )
    raise RequestError(*lines)


def overlaps(rows: Iterable[Text], secrets: Sequence[Text]) -> list[Overlap]:
    """The rows that share a run of words with a secret text, or are one; in the order of the rows.

    The rows are read once; only those with something in common are kept in memory.
    """
    index = _Index(secrets)
    found: list[Overlap | _Shared] = []
    carriers = np.zeros(len(index.grams), dtype=np.int64)  # different rows that have each run
    seen: set[int] = set()
    for row in rows:
        units = words(row.text)
        if len(units) < N:
            text = folded(row.text)
            if text and (number := index.short.get(text)) is not None:
                found.append(Overlap(row.where, secrets[number].where, 1.0, text, len(units)))
            continue
        ids = index.ids_of(units)
        grams = index.grams_of(ids)
        if not (grams >= 0).any():
            continue
        found.append(_Shared(row.where, units, ids, grams))
        if (key := hash(tuple(units))) not in seen:
            seen.add(key)
            carriers[np.unique(grams[grams >= 0])] += 1
    index.count(carriers)
    told = (index.closest(one) if isinstance(one, _Shared) else one for one in found)
    return [overlap for overlap in told if overlap is not None]


@dataclass(frozen=True)
class _Shared:
    """A row of n words that has runs of a secret text."""

    where: str
    units: list[str]
    ids: Ids
    """(n,) its words by number; 0 for words that no secret text has."""
    grams: Numbers
    """(n - N + 1,) its runs by number; -1 for runs that no secret text has."""


class _Index:
    """The secret texts by their runs."""

    def __init__(self, secrets: Sequence[Text]) -> None:
        self._secrets = secrets
        self.short: dict[str, int] = {}
        """Folded text -> secret, of those shorter than a run."""
        self._vocabulary: dict[str, int] = {}
        self._ids: dict[int, Ids] = {}
        for number, secret in enumerate(secrets):
            units = words(secret.text)
            if len(units) < N:
                self.short.setdefault(folded(secret.text), number)
            else:
                for unit in units:
                    self._vocabulary.setdefault(unit, len(self._vocabulary) + 1)
                self._ids[number] = self.ids_of(units)
        hashes = {number: _hashes(ids) for number, ids in self._ids.items()}
        self.grams = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes.values()]))
        """(G,) hashes of all runs, sorted; a run's number is its place here."""
        self._grams = {n: np.searchsorted(self.grams, h).tolist() for n, h in hashes.items()}
        self._places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        """Run -> each secret that has it, and where in it."""
        for number, grams in self._grams.items():
            for place, gram in enumerate(grams):
                self._places[gram].append((number, place))

    def ids_of(self, units: Sequence[str]) -> Ids:
        """(n,) words by number, 0 for unknown ones."""
        return np.fromiter((self._vocabulary.get(u, 0) for u in units), np.uint64, len(units))

    def grams_of(self, ids: Ids) -> Numbers:
        """(n - N + 1,) runs by number, -1 for unknown ones."""
        hashes = _hashes(ids)
        if not len(self.grams):
            return np.full(len(hashes), -1)
        place = np.minimum(np.searchsorted(self.grams, hashes), len(self.grams) - 1)
        return np.where(self.grams[place] == hashes, place, -1)

    def count(self, carriers: Numbers) -> None:
        """Be told how many rows have each run; each secret is then looked for by its rarest."""
        self._boilerplate = carriers > BOILERPLATE
        self._anchors: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, grams in self._grams.items():
            rarest = int(np.argmin(carriers[grams]))
            self._anchors[grams[rarest]].append((number, rarest))

    def closest(self, row: _Shared) -> Overlap | None:
        """The secret that the row has most in common with; None if it is but boilerplate."""
        for number, start in chain(self._inside(row), self._around(row)):
            return self._told(row, number, 1.0, start)
        covered: dict[int, set[int]] = defaultdict(set)
        first: dict[int, int] = {}
        for place, gram in enumerate(row.grams.tolist()):
            if gram < 0 or self._boilerplate[gram]:
                continue
            for number, there in self._places[gram]:
                at = there if len(self._ids[number]) < len(row.ids) else place
                covered[number].update(range(at, at + N))
                first.setdefault(number, place)
        shares = {
            number: len(places) / min(len(self._ids[number]), len(row.ids))
            for number, places in covered.items()
        }
        if not shares:
            return None
        best = max(shares, key=shares.__getitem__)
        return self._told(row, best, shares[best], first[best])

    def _told(self, row: _Shared, number: int, share: float, start: int) -> Overlap:
        size = min(len(row.ids), len(self._ids[number]))
        matched = excerpt(row.units[start : start + size])
        return Overlap(row.where, self._secrets[number].where, share, matched, size)

    def _inside(self, row: _Shared) -> Iterator[tuple[int, int]]:
        """Secrets that stand whole in the row, and where."""
        for place, gram in enumerate(row.grams.tolist()):
            for number, there in self._anchors.get(gram, ()):
                start, text = place - there, self._ids[number]
                if start >= 0 and np.array_equal(row.ids[start : start + len(text)], text):
                    yield number, start

    def _around(self, row: _Shared) -> Iterator[tuple[int, int]]:
        """Secrets that the row stands whole in."""
        if (row.grams < 0).any():
            return
        place, gram = min(enumerate(row.grams.tolist()), key=lambda pg: len(self._places[pg[1]]))
        for number, there in self._places[gram]:
            start = there - place
            text = self._ids[number][max(start, 0) : start + len(row.ids)]
            if start >= 0 and np.array_equal(text, row.ids):
                yield number, 0


def _hashes(ids: Ids) -> Ids:
    """(n - N + 1,) a hash of each run: multilinear modulo 2^64 with odd random factors."""
    hashed: Ids = sliding_window_view(ids, N) @ _FACTORS
    return hashed


_FACTORS = np.random.default_rng(0).integers(0, 2**63, N, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)
