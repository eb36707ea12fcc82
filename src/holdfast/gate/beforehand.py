"""What a gate refuses before anything is computed: it could not, or must not, end in a PASS."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import RequestError, did_you_mean
from holdfast.gate.margins import DEFAULT_MARGINS, UNIT_OF, Gate, Margin, candidate_keys
from holdfast.gate.stats import paired_difference
from holdfast.meters import Reading
from holdfast.meters.probes.items import Item, content

SHOWN = 8
"""Item ids that are named at once."""


@dataclass(frozen=True)
class Capability:
    """What will be judged under one name: its sealed items, by cluster."""

    meter: str
    name: str
    unit: str
    tags: tuple[str, ...]
    clusters: tuple[str, ...]
    """Of each sealed item."""

    @classmethod
    def of(cls, reading: Reading) -> Capability:
        """What a reading was taken of."""
        clusters = tuple(reading.clusters.get(item, item) for item in reading.items)
        return cls(reading.meter, reading.name, reading.unit, reading.tags, clusters)


def capabilities(items: Iterable[Item], canary: Mapping[str, Sequence[str]]) -> list[Capability]:
    """Of the items that are judged and of the canary: domain -> cluster of each sealed document."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if "recovery" not in item.tags:
            groups[item.probe].append(item)
    found = [
        Capability(
            "probe",
            probe,
            group[0].unit,
            tuple(sorted({tag for item in group for tag in item.tags})),
            tuple(item.cluster or item.id for item in group),
        )
        for probe, group in sorted(groups.items())
    ]
    return found + [
        Capability("canary", domain, "nats", ("canary",), tuple(clusters))
        for domain, clusters in sorted(canary.items())
    ]


def carried(before: Gate, gate: Gate, read: Iterable[Capability]) -> dict[str, str]:
    """Margins that an earlier gate set for what is read, of those that this one does not set."""
    found = {}
    for one in read:
        named = (one.meter, one.name, one.unit, one.tags)
        mine, theirs = gate.margin_for(*named), before.margin_for(*named)
        if theirs and theirs[1] in before.margins and (not mine or mine[1] not in gate.margins):
            found[f"{one.meter}/{one.name}"] = str(theirs[0])
    return found


def require_known(gate: Gate, read: Sequence[Capability], where: str = "margins") -> None:
    """Refuse a margin that nothing read answers to, or in a unit that does not fit.

    Raises:
        RequestError: a line for each, with the name that was probably meant.
    """
    keys = {c: set(candidate_keys(c.meter, c.name, c.unit, c.tags)) for c in read}
    names = {c.name for c in read} | {
        key for c in read for key in keys[c] if key in DEFAULT_MARGINS
    }
    problems = []
    for key, text in gate.margins.items():
        named = [c for c in read if key in keys[c]]
        unit = Margin.parse(text).unit
        if not named:
            problems.append(
                f"{where}: '{key}' names nothing that is read, so its {text} would guard nothing; "
                f"{did_you_mean(key, names)}"
            )
        elif all(UNIT_OF[c.unit] != unit for c in named):
            fits = UNIT_OF[named[0].unit]
            problems.append(
                f"{where}: '{key}' is read in {named[0].unit}, and {text} is no margin of that; "
                f"write {key}: {text.removesuffix(unit)}{fits}"
            )
    if problems:
        raise RequestError(*problems)


def require_decidable(gate: Gate, read: Sequence[Capability]) -> None:
    """Refuse what has too few items to pass even if not one answer changes.

    The bounds of a difference of zero on every item are the gate's own for so many items, clusters
    and alpha: Tango's interval ends at `-z^2 / (n + z^2)`, a single cluster decides nothing.

    Raises:
        RequestError: a line for each capability, with the items it takes.
    """
    if problems := undecidable(gate, read):
        raise RequestError(*problems)


def undecidable(gate: Gate, read: Sequence[Capability]) -> list[str]:
    """A line for each capability that could not pass; see `require_decidable`."""
    return [line for one in read if (line := _undecidable(gate, one))]


def _undecidable(gate: Gate, one: Capability) -> str:
    if "adoption" in one.tags and gate.adoption == "report":
        return ""
    if "target" in one.tags:
        if gate.target == "report" or _kept(one, gate.alpha, risen=True) > 0:
            return ""
        return (
            f"{one.name}: {_counted(one)} could not show a rise even if all of it rose; "
            "give more items, in several clusters"
        )
    found = gate.margin_for(one.meter, one.name, one.unit, one.tags)
    assert found is not None, "every unit of UNIT_OF has a default margin"
    margin, fall = found[0], -_kept(one, gate.alpha)
    # a relative margin of a loss is some positive number of nats, whatever the base's mean
    accepted = margin.amount / 100 if margin.unit == "pt" else 1e-12
    if fall < accepted:
        return ""
    if margin.unit == "%":
        return (
            f"{one.name}: {_counted(one)} could never pass: one text alone, or one that is most of "
            "them, has no spread to judge a margin by; give more texts, such as 200"
        )
    return (
        f"{one.name}: {_counted(one)} could never pass: with not one answer changed, a fall of up "
        f"to {100 * fall:.1f}pt is still possible, and the margin is {margin}; give at least "
        f"{_enough(gate.alpha, accepted)} {'clusters of one size' if _grouped(one) else 'items'}, "
        "or a wider margin"
    )


def _kept(one: Capability, alpha: float, risen: bool = False) -> float:
    """The lower bound where every item stays as it was (or rises from wrong to right)."""
    none = [0.0] * len(one.clusters)
    after = [1.0] * len(none) if risen else none
    if not none:
        return -1.0
    bounded = one.unit == "accuracy"
    lower = paired_difference(
        none, after, clusters=one.clusters, alpha=alpha, bounded=bounded
    ).lower
    return float(lower)


def _enough(alpha: float, margin: float) -> int:
    """The smallest n with z^2 / (n + z^2) < margin."""
    from scipy.special import ndtri

    z2 = float(ndtri(alpha)) ** 2
    return int(z2 * (1 - margin) / margin) + 1


def _grouped(one: Capability) -> bool:
    return len(set(one.clusters)) < len(one.clusters)


def _counted(one: Capability) -> str:
    n, groups = len(one.clusters), len(set(one.clusters))
    what = "sealed document" if one.meter == "canary" else "item"
    text = f"{n} {what}" + ("" if n == 1 else "s")
    return f"{text} in {groups} cluster{'' if groups == 1 else 's'}" if groups < n else text


def require_apart(sealed: Iterable[Item], selection: Iterable[Item]) -> None:
    """Refuse items that something was chosen by and that would be judged: by what they ask.

    Raises:
        RequestError: one line with the items' ids.
    """
    chosen_by = {content(item): item for item in selection}
    both = [(item, chosen_by[content(item)]) for item in sealed if content(item) in chosen_by]
    if not both:
        return
    shown = ", ".join(_pair(*pair) for pair in both[:SHOWN])
    more = f" and {len(both) - SHOWN} more" if len(both) > SHOWN else ""
    raise RequestError(
        f"probes: {len(both)} items of the sealed split are also in the selection split, by which "
        f"something was chosen: {shown}{more}; judge by other items, or by the sealed half of "
        "these (items: sealed), and give items that ask the same one cluster"
    )


def _pair(sealed: Item, chosen_by: Item) -> str:
    one, other = (f"{item.probe}/{item.id}" for item in (sealed, chosen_by))
    return one if one == other else f"{one} (= {other})"


def require_unchanged(recorded: Mapping[str, str], found: Mapping[str, str], where: str) -> None:
    """Refuse files whose hash is not the recorded one. Raises RequestError, a line a file.

    Args:
        recorded: file -> sha256, as it was.
        found: file -> sha256 of the files that are read; by path or by the path's last part.
        where: what recorded it.
    """
    by_name = {**{Path(path).name: sha for path, sha in found.items()}, **found}
    problems = []
    for path, sha in recorded.items():
        now = by_name.get(path, "")
        if not now:
            problems.append(
                f"{where}: '{path}' is not among the files that are read; "
                f"{did_you_mean(path, by_name)}"
            )
        elif not (sha and now.startswith(sha.lower())):
            problems.append(
                f"{where}: '{path}' has changed: its sha256 was {sha[:12]} and is {now[:12]}; "
                "restore the file, or record the new hash if the change was meant"
            )
    if problems:
        raise RequestError(*problems)


def hashes(paths: Iterable[str]) -> dict[str, str]:
    """Path -> sha256 of each file that lies here; a hub id has none."""
    return dict(_hashed(paths))


def _hashed(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    for path in paths:
        file = Path(path).expanduser()
        if file.is_file():
            with file.open("rb") as stream:
                yield path, hashlib.file_digest(stream, "sha256").hexdigest()
