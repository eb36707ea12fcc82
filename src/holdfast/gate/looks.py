"""How often the sealed items have been looked at: a ledger beside the stored probe results.

`$HOLDFAST_CACHE/looks/KEY/TUNED` (default: `~/.cache/holdfast/looks`), an empty file a model: KEY
is a hash of the base's weights, the capability's name and its sealed items; TUNED one of the tuned
model's weights. So the same model again is no new look, a changed item starts a new count, and two
processes can count at once: a file is made or is there already.

A model that was chosen after k looks at the same items passes wrongly with a chance of up to
k alpha (Bonferroni), not alpha: that is printed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import RequestError
from holdfast.files import cache_folder
from holdfast.lineage import locate
from holdfast.meters import Reading
from holdfast.meters.probes.items import Item, content


@dataclass(frozen=True)
class Looks:
    """How many models were judged on each capability's sealed items, this one included."""

    counts: Mapping[str, int]
    """meter/name -> models."""
    problem: str = ""
    """Why it could not be counted; empty where it was."""

    @property
    def most(self) -> int:
        """Models judged on the items that were looked at most."""
        return max(self.counts.values(), default=0)

    def sentence(self, alpha: float) -> str:
        """What the count means for the verdict."""
        if self.problem:
            return f"not counted ({self.problem})"
        if self.most <= 1:
            return "the first for this base"
        again = sorted(name for name, count in self.counts.items() if count == self.most)
        some = ", ".join(again[:3]) + (", ..." if len(again) > 3 else "")
        return (
            f"model {self.most} of this base that is judged on them "
            f"({some}); if the earlier verdicts led to this model, a false PASS has a chance of up "
            f"to {100 * min(1.0, self.most * alpha):.3g}%, not {100 * alpha:.3g}%: "
            "fresh items mend that"
        )


def look(
    base: str, tuned: str, items: Iterable[Item], before: Iterable[Reading], other: str = ""
) -> Looks:
    """Note that `tuned` was judged by the sealed readings of its base, and say how many were.

    Args:
        base: a model folder, adapter, run folder or hub id, as `tuned`.
        items: of the probes; more of them do no harm.
        before: readings of the base.
        other: what stands for the base's weights where its files are not here.
    """
    asked = {(item.probe, item.id): content(item) for item in items}
    sealed = {
        f"{r.meter}/{r.name}": [asked.get((r.name, i), i) for i in r.items]
        for r in before
        if r.split == "sealed" and r.meter in ("probe", "canary")
    }
    return count(weights_id(base) or other or base, weights_id(tuned) or tuned, sealed)


def count(
    base: str, tuned: str, sealed: Mapping[str, Sequence[str]], folder: Path | None = None
) -> Looks:
    """Note that a model was judged, and say how many were.

    Args:
        base: hash of the base's weights.
        tuned: hash of the tuned model's weights.
        sealed: meter/name -> a hash of each item's content.
        folder: of the ledger; None: the user's.
    """
    folder = folder or cache_folder() / "looks"
    counts = {}
    try:
        for name, items in sealed.items():
            key = hashlib.sha256(json.dumps([base, name, sorted(items)]).encode()).hexdigest()
            seen = folder / key
            seen.mkdir(parents=True, exist_ok=True)
            (seen / tuned).touch()
            counts[name] = sum(1 for _ in seen.iterdir())
    except OSError as error:
        return Looks({}, f"{folder}: {error.strerror or error}")
    return Looks(counts)


def weights_id(path: str) -> str:
    """A hash of the weight files that `path` names, wherever they lie; empty where they are not.

    Of a hub id, and of a folder that is gone, there are none.
    """
    try:
        stage = locate(path)
    except RequestError:
        return ""
    folders = [Path(stage.model).expanduser(), *stage.adapters]
    if not folders[0].is_dir():
        return ""
    digests = []
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
