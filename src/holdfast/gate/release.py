"""May this model be released? Base and tuned are read on the sealed split, and judged.

Everything that can be refused is refused before a weight is loaded (`beforehand.py`); a reading
that is missing, not finite or of other items is never a PASS (`verdict.py`); and what is asked
again of the same sealed items is counted (`looks.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.artifact import RunFolder
from holdfast.checkpoint import Dtype
from holdfast.data.rows import iter_rows
from holdfast.errors import RequestError
from holdfast.gate.beforehand import (
    Capability,
    capabilities,
    hashes,
    require_apart,
    require_decidable,
    require_known,
    require_unchanged,
)
from holdfast.gate.file import GateFile
from holdfast.gate.looks import Looks, look
from holdfast.gate.verdict import GateResult
from holdfast.measure import require_finite, row_hash
from holdfast.meters import Reading, half_of
from holdfast.meters.canary import OWN_SAMPLES, Canary
from holdfast.meters.probes import Item, load_items
from holdfast.pair import QUIET, TUNED_STEP, Texts, decided, in_bits, load_pair, readers, versions


@dataclass(frozen=True)
class Release:
    """The verdict on one model, and what it rests on."""

    verdict: GateResult
    looks: Looks
    about: dict[str, Any] = field(default_factory=dict)
    """Models, files and their hashes, seconds."""

    def as_dict(self) -> dict[str, Any]:
        """The content of `verdict.json`."""
        looks = {"models": dict(self.looks.counts), "problem": self.looks.problem}
        return {**self.verdict.as_dict(), "looks": looks, **self.about}


def release(
    base: str,
    tuned: str,
    terms: GateFile,
    *,
    tokenizer: str | None = None,
    dtype: Dtype = "auto",
    seed: int = 0,
    console: Console = QUIET,
) -> Release:
    """Judge whether `tuned` has kept what `base` could, on sealed items alone.

    Args:
        base: a model folder, a hub id, a run folder or an adapter; and so is `tuned`.
        terms: margins, level, texts, and what must not be judged.
        tokenizer: of both, where their folders have none.
        dtype: of the weights in memory; see `Model.dtype`.
        seed: of the canary, where the base writes it.

    Raises:
        RequestError: the request could not end in a PASS or must not (before anything is
            computed), one of the two cannot be read, or they are the same weights.
    """
    started = time.perf_counter()
    texts = Texts(terms.canary, terms.probes, terms.run_generated_code)
    items, by_halves = _judged_items(texts.items(), terms, tuned)
    read = capabilities(items, sealed_clusters(terms.canary))
    require_known(terms, read)
    require_decidable(terms, [c for c in read if c.name != OWN_SAMPLES])
    paths = [*terms.probes, *(source.path for source in terms.canary.sources)]
    require_unchanged(terms.sha256, files := hashes(paths), "sha256")

    pair = load_pair(base, tuned, tokenizer, dtype, console)
    notes: dict[str, Any] = {}
    both, alike = readers(pair, texts, items, seed, notes, console)
    one, other = (
        replace(reader, canary=[d for d in reader.canary if d.split == "sealed"]) for reader in both
    )
    with console.status(f"reading {base}"):
        before = one.whole(pair.base.model, 0, cached=True)
    with console.status(f"reading {tuned}"):
        after = other.whole(pair.tuned.model, TUNED_STEP, cached=True)
    if not alike:
        before, after = in_bits(before), in_bits(after)
    require_finite(before, f"BASE '{base}'")
    require_finite(after, f"TUNED '{tuned}'")
    _require_read(read, before, after)
    require_unchanged(files, hashes(paths), "while the models were read")
    verdict = decided(before, after, terms, alike)
    about = {
        "base": {"path": base, "weights_sha256": pair.base_sha},
        "tuned": {"path": tuned, "weights_sha256": pair.tuned_sha},
        "items": "sealed half" if by_halves else "all",
        "sha256": files,
        "versions": versions(),
        **notes,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return Release(verdict, look(base, tuned, items, before), about)


def _judged_items(items: list[Item], terms: GateFile, tuned: str) -> tuple[list[Item], bool]:
    """The items that are judged, and whether they are the sealed half of those given.

    Raises:
        RequestError: something was chosen by items that would be judged.
    """
    items = [item for item in items if "recovery" not in item.tags]
    halved = chosen_by_halves(tuned)
    by_halves = terms.items == "sealed" or (terms.items == "auto" and halved)
    judged = [item for item in items if item.split == "sealed"] if by_halves else items
    if lost := sorted({i.probe for i in items} - {i.probe for i in judged}):
        raise RequestError(
            f"probes: '{lost[0]}' has no item in the sealed half, so it would not be judged; give "
            "more items, such as 200, in several clusters"
        )
    chosen_by = load_items(terms.selection) if terms.selection else []
    if halved or by_halves:
        chosen_by += [item for item in items if item.split == "selection"]
    require_apart(judged, chosen_by)
    return judged, by_halves


def chosen_by_halves(tuned: str) -> bool:
    """Whether `tuned` came out of a choice that looked at the selection half of the probes.

    So did a rewound model, and a run that read its probes while training: their folder's readings
    say so, of an adapter, a model or a checkpoint inside it as well.
    """
    folder = Path(tuned).expanduser().absolute()
    return any(
        record.get("meter") == "probe" and record.get("split") == "selection"
        for place in (folder, *folder.parents[:2])
        for record in RunFolder(place).records()
    )


def sealed_clusters(canary: Canary) -> dict[str, list[str]]:
    """Domain -> the rows of the canary that fall to the sealed half; of samples: not known yet."""
    if not canary.sources:
        return {OWN_SAMPLES: []}
    seen: dict[str, dict[str, None]] = {}
    rows: Counter[str] = Counter()
    for source in canary.sources:
        for row in iter_rows(source):
            domain = row.domain or Path(source.path).stem
            seen.setdefault(domain, {})
            if rows[domain] < canary.max_documents and (one := row_hash(row)) not in seen[domain]:
                rows[domain] += 1
                seen[domain][one] = None
    return {d: [one for one in found if half_of(one) == "sealed"] for d, found in seen.items()}


def _require_read(
    read: Sequence[Capability], before: Sequence[Reading], after: Sequence[Reading]
) -> None:
    """What was to be judged and is in neither reading would be in no row of the verdict."""
    for found, which in ((before, "BASE"), (after, "TUNED")):
        there = {(r.meter, r.name): r.n for r in found if r.split == "sealed"}
        for one in read:
            if not there.get((one.meter, one.name)):
                raise RequestError(
                    f"{one.meter}: '{one.name}' was to be judged, and nothing was read of it of "
                    f"{which}; give it texts or items in the sealed split"
                )
