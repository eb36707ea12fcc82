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

By that alone, more than ten copies of one secret text, each with a word changed, would pass for
rows of a template. But a template is in other secret texts, too, or each of its rows is filled
otherwise; copies agree, with the secret text or, where it was changed, with each other. So a row is
contaminated as well where it and `BOILERPLATE` different rows more have, in line with a run that no
other secret text has,

- `CONTAMINATED` of the words of a secret text of 26 words or more;
- `CONTAMINATED` of its own words, those in no run of another secret text; of fewer than 26 all, for
  they may be what is asked;

and where it lacks a word, at least half of those rows have one and the same. Of a secret text that
shares no run with another, one word that each row has otherwise is no template yet.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

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

Ids = NDArray[np.uint32]
Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Overlap:
    """A row, and the secret text that it shares most with."""

    row: str
    """Where the row stands."""
    secret: str
    """Where the secret text stands."""
    share: float
    """Part of the shorter one's words that lies in shared runs, 0..1; of one of many changed copies
    the part of the secret text's words."""
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

    The rows are read once; of those with something in common, 8 bytes a word are kept in memory.
    """
    index = _Index(secrets)
    found: list[Overlap | _Shared] = []
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
        key = hash(tuple(units))
        found.append(_Shared(row.where, ids, grams, key not in seen))
        seen.add(key)
    index.count([one for one in found if isinstance(one, _Shared) and one.new])
    told = (index.closest(one) if isinstance(one, _Shared) else one for one in found)
    return [overlap for overlap in told if overlap is not None]


@dataclass(frozen=True)
class _Shared:
    """A row of n words that has runs of a secret text."""

    where: str
    ids: Ids
    """(n,) its words by number; those that no secret text has by a hash, `_UNKNOWN` or more."""
    grams: Numbers
    """(n - N + 1,) its runs by number; -1 for runs that no secret text has."""
    new: bool
    """Whether no row before it has the same words."""


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
        self._words = ["", *self._vocabulary]
        """By number."""
        hashes = {number: _hashes(ids) for number, ids in self._ids.items()}
        self.grams = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes.values()]))
        """(G,) hashes of all runs, sorted; a run's number is its place here."""
        self._grams = {n: self._numbered(h) for n, h in hashes.items()}
        self._places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        """Run -> each secret that has it, and where in it."""
        for number, grams in self._grams.items():
            for place, gram in enumerate(grams.tolist()):
                self._places[gram].append((number, place))
        texts = {ids.tobytes(): number for number, ids in self._ids.items()}
        holders = np.zeros(len(self.grams), dtype=np.int64)
        for number in texts.values():
            holders[np.unique(self._grams[number])] += 1
        self._alone = holders == 1
        """(G,) whether a run is in one secret only; the same text twice is one."""
        self._own = {
            number: np.convolve(~self._alone[grams], np.ones(N)) == 0
            for number, grams in self._grams.items()
        }
        """Secret -> (n,) which of its words are in no run of another one."""

    def ids_of(self, units: Sequence[str]) -> Ids:
        """(n,) words by number, unknown ones by a hash."""
        numbers = (self._vocabulary.get(u) or _UNKNOWN + hash(u) % _UNKNOWN for u in units)
        return np.fromiter(numbers, np.uint32, len(units))

    def grams_of(self, ids: Ids) -> Numbers:
        """(n - N + 1,) runs by number, -1 for unknown ones."""
        hashes = _hashes(ids)
        if not len(self.grams):
            return np.full(len(hashes), -1, dtype=np.int32)
        place = np.minimum(self._numbered(hashes), len(self.grams) - 1)
        return np.where(self.grams[place] == hashes, place, np.int32(-1))

    def _numbered(self, hashes: Hashes) -> Numbers:
        return np.searchsorted(self.grams, hashes).astype(np.int32)

    def count(self, rows: Sequence[_Shared]) -> None:
        """Be told all different rows: what is boilerplate, and where rows of a template differ."""
        carriers = np.zeros(len(self.grams), dtype=np.int64)
        for row in rows:
            carriers[np.unique(row.grams[row.grams >= 0])] += 1
        self._boilerplate = carriers > BOILERPLATE
        self._anchors: dict[int, list[tuple[int, int]]] = defaultdict(list)
        """A secret's rarest run -> the secret, and where in it: what it is looked for by."""
        for number, grams in self._grams.items():
            rarest = int(np.argmin(carriers[grams]))
            self._anchors[int(grams[rarest])].append((number, rarest))
        copies: Counter[int] = Counter()
        changed: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
        for row in rows:
            for number, had, line in self._along(row):
                copies[number] += 1
                places = np.flatnonzero(~had)
                changed[number].update(zip(places.tolist(), line[places].tolist(), strict=True))
        self._slots = {
            number: _slots(len(self._ids[number]), changed[number], count)
            for number, count in copies.items()
            if count > BOILERPLATE
        }
        """Secret that many rows have most of -> (n,) which of its places each fills otherwise."""

    def closest(self, row: _Shared) -> Overlap | None:
        """The secret that the row has most in common with; None if it is but boilerplate."""
        for number, start in chain(self._inside(row), self._around(row)):
            return self._told(row, number, 1.0, start)
        closest = self._covered(row)
        if closest is not None and closest.contaminated:
            return closest
        return max(self._copied(row), key=lambda copied: copied.share, default=closest)

    def _covered(self, row: _Shared) -> Overlap | None:
        """The secret that shared runs, but for boilerplate, cover most of, or of the row."""
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
        known = takewhile(_UNKNOWN.__gt__, row.ids[start : start + size].tolist())
        matched = excerpt([self._words[number] for number in known])
        return Overlap(row.where, self._secrets[number].where, share, matched, size)

    def _copied(self, row: _Shared) -> Iterator[Overlap]:
        """Secrets that many rows are changed copies of, and this one is."""
        for number, had, _ in self._along(row):
            forgiven = 1 if self._own[number].all() else 0
            if number in self._slots and (self._slots[number] & ~had).sum() <= forgiven:
                start = int(np.isin(row.grams, self._grams[number]).argmax())
                yield self._told(row, number, float(had.mean()), start)

    def _along(self, row: _Shared) -> Iterator[tuple[int, Mask, Ids]]:
        """Secrets that the row has most of in line with runs that no other secret has.

        With each comes which of its (n,) words the row has, and what the row has in their places.
        """
        shifts: dict[int, set[int]] = defaultdict(set)
        for place in np.flatnonzero((row.grams >= 0) & self._alone[row.grams]).tolist():
            for number, there in self._places[row.grams[place]]:
                shifts[number].add(place - there)
        for number, found in shifts.items():
            text = self._ids[number]
            size = len(text)
            if min(size, len(row.ids)) < 2 * N:
                continue
            padded = np.pad(row.ids, size, constant_values=_NONE)
            lines = np.stack([padded[size + shift :][:size] for shift in sorted(found)])
            same = lines == text
            had = same.any(axis=0)
            if _most(had) and _most(had[self._own[number]]):
                yield number, had, lines[same.sum(axis=1).argmax()]

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


def _most(had: Mask) -> bool:
    """Whether enough words are had; of few all, for each may be what is asked."""
    return bool(had.mean() >= CONTAMINATED if len(had) >= 2 * N else had.all())


def _slots(size: int, changed: Counter[tuple[int, int]], rows: int) -> Mask:
    """(size,) the places of a secret where no word is that of half the rows.

    Args:
        changed: how many rows have which other word, or `_NONE`, at which place.
        rows: how many there are; the others have the secret's word.
    """
    common = np.full(size, rows)
    """(size,) how many rows have the secret's word."""
    commonest = np.zeros(size, dtype=np.int64)
    for (place, word), count in changed.items():
        common[place] -= count
        if word != _NONE:
            commonest[place] = max(commonest[place], count)
    slots: Mask = 2 * np.maximum(common, commonest) < rows
    return slots


def _hashes(ids: Ids) -> Hashes:
    """(n - N + 1,) a hash of each run: multilinear modulo 2^64 with odd random factors."""
    hashed: Hashes = sliding_window_view(ids.astype(np.uint64), N) @ _FACTORS
    return hashed


_NONE = 0
"""Instead of a word, before a row's first and after its last."""
_UNKNOWN = 2**31
"""Words of secret texts have lower numbers, other words this or a higher one."""
_FACTORS = np.random.default_rng(0).integers(0, 2**63, N, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)
