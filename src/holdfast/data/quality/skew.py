"""Skew: what a few kinds of response outweigh the others by (openings, lengths, labels, scripts).

The loss is a mean over tokens, so that long responses outweigh short ones, and a model given one
answer most of the time learns to give it without reading the question.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from holdfast.data.quality.finding import Finding, Quality, Sample, graded
from holdfast.data.texts import folded, words

OPENING = 4
"""Words of an opening; shorter responses have none."""
LABEL_WORDS = 3
"""A label has at most so many words."""
LABEL_ROWS = 10
"""Responses are labels where each of them comes this often on average, in so many rows or more."""
STRAY = 0.01
"""Rows of a script that fewer of the responses than this are in are named."""


def openings(samples: Sequence[Sample], quality: Quality) -> list[Finding]:
    """Responses that begin alike."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for sample in samples:
        start = tuple(words(sample.response[:200])[:OPENING])
        if len(start) == OPENING:
            groups[start].append(sample.where)
    if not groups:
        return []
    start, rows = max(groups.items(), key=lambda entry: len(entry[1]))
    share = len(rows) / len(samples)
    return graded(
        "openings",
        share if share >= quality.openings / 5 and len(rows) > 1 else 0.0,
        quality.openings,
        f"{share:.1%} of the responses begin with '{' '.join(start)}'",
        "vary or cut the opening, unless every answer is to begin so",
        rows if share >= quality.openings else (),
        different=len(groups),
    )


def lengths(samples: Sequence[Sample], quality: Quality) -> list[Finding]:
    """How much of the loss the longest tenth of the responses is."""
    sizes = [len(words(sample.response)) for sample in samples]
    if len(sizes) < 10 or not sum(sizes):
        return []
    order = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
    longest = order[: len(order) // 10]
    share = sum(sizes[row] for row in longest) / sum(sizes)
    median = sizes[order[len(order) // 2]]
    return graded(
        "lengths",
        share,
        quality.length_skew,
        f"the longest tenth of the responses holds {share:.0%} of all response words "
        f"(median {median} words, longest {sizes[order[0]]})",
        "shorten or split the longest, or take some out: the loss counts tokens, not rows",
        [samples[row].where for row in longest] if share >= quality.length_skew else (),
        median=median,
        longest=sizes[order[0]],
    )


def labels(samples: Sequence[Sample], quality: Quality) -> list[Finding]:
    """The commonest label and the entropy of all, where the responses are labels."""
    counts = Counter(folded(sample.response) for sample in samples)
    few = len(samples) >= LABEL_ROWS * max(2, len(counts))
    if not few or any(len(words(label)) > LABEL_WORDS for label in counts):
        return []
    label, most = counts.most_common(1)[0]
    share = most / len(samples)
    entropy = -sum(n / len(samples) * math.log2(n / len(samples)) for n in counts.values())
    told = ", ".join(f"'{name}' {n}" for name, n in counts.most_common(5))
    rarest = min(counts, key=lambda name: (counts[name], name))
    skewed = share >= quality.label_majority
    return graded(
        "labels",
        share,
        quality.label_majority,
        f"the responses are {len(counts)} labels of {entropy:.2f} bits in all: {told}",
        f"add rows of the rarer labels, or take out some of '{label}'; "
        f"always saying '{label}' is right {share:.0%} of the time",
        [s.where for s in samples if folded(s.response) == rarest] if skewed else (),
        entropy_bits=entropy,
        labels=len(counts),
    )


def scripts(samples: Sequence[Sample], quality: Quality) -> list[Finding]:
    """Scripts of the responses; languages that share a script are not told apart."""
    rows: dict[str, list[str]] = defaultdict(list)
    for sample in samples:
        if script := _script(sample.response):
            rows[script].append(sample.where)
    if len(rows) < 2:
        return []
    ranked = sorted(rows, key=lambda script: (-len(rows[script]), script))
    total = sum(map(len, rows.values()))
    told = ", ".join(f"{script} {len(rows[script])}" for script in ranked)
    strays = [where for s in ranked[1:] for where in rows[s] if len(rows[s]) < STRAY * total]
    return [
        Finding(
            "scripts",
            "note",
            f"the responses are in {len(rows)} scripts: {told}",
            "see whether the rows of the rarer ones belong there; give each language a canary",
            tuple(strays),
            {"scripts": len(rows), "strays": len(strays)},
        )
    ]


def _script(text: str) -> str | None:
    """The script that most letters of the text are of ("latin", "cjk", "arabic")."""
    letters = (letter for letter in text[:1000] if letter.isalpha())
    counts = Counter(unicodedata.name(letter, "other").split()[0].lower() for letter in letters)
    return max(counts, key=lambda name: (counts[name], name)) if counts else None
