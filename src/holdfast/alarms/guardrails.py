"""What is watched: each guardrail's items in disjoint blocks, and the fall that is accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.alarms.rules import Alarms
from holdfast.gate.margins import Gate, lower_is_better
from holdfast.gate.sequential import allowed_fall, fresh_blocks
from holdfast.meters import Reading

CLIP = 10.0
"""A document counts for a rise of at most so many margins: bets on small rises stay worthwhile."""
MOST = 0.5
"""The rule by speed accepts no larger fall of an accuracy, however long the run."""


@dataclass(frozen=True)
class Guardrail:
    """One capability that must not fall, as the selection split shows it."""

    meter: str
    name: str
    unit: str
    before: Mapping[str, float]
    """item id -> its value under the base; higher is better (a loss is negated)."""
    clusters: Mapping[str, str]
    blocks: Sequence[Sequence[str]]
    """Disjoint; the same for the same seed, so a resumed run needs their number only."""
    margin: float | None
    """Largest accepted rise of a loss, in its unit; None for an accuracy, which has a speed."""

    @property
    def key(self) -> str:
        """`canary/DOMAIN` or `probe/NAME`."""
        return f"{self.meter}/{self.name}"

    @property
    def clip(self) -> float:
        """What one item counts for at most."""
        return 1.0 if self.margin is None else CLIP * self.margin

    def accepted(self, step: int, rate: float) -> float:
        """The fall that is accepted at this step, in the unit of the values."""
        return min(allowed_fall(step, rate), MOST) if self.margin is None else self.margin

    def after(self, reading: Reading) -> dict[str, float]:
        """The values of a reading, higher is better."""
        sign = -1.0 if lower_is_better(self.unit) else 1.0
        return {item: sign * value for item, value in reading.items.items()}


def guardrails(
    before: Sequence[Reading], gate: Gate, rule: Alarms, seed: int = 0
) -> list[Guardrail]:
    """The guardrails among the base's readings of the selection split; targets are none.

    Args:
        before: with single items; other splits and meters are passed over.
        gate: the margin of each loss.
        rule: the size of a block.
        seed: of the order in which items are read.
    """
    found = []
    for reading in before:
        if reading.split != "selection" or not _guards(reading, gate):
            continue
        loss = lower_is_better(reading.unit)
        margin = gate.margin_for(reading.meter, reading.name, reading.unit, reading.tags)
        if margin is None or not reading.items:
            continue
        clusters = {item: reading.clusters.get(item, item) for item in reading.items}
        found.append(
            Guardrail(
                reading.meter,
                reading.name,
                reading.unit,
                {item: -v if loss else v for item, v in reading.items.items()},
                clusters,
                fresh_blocks(sorted(reading.items), rule.block, clusters=clusters, seed=seed),
                margin[0].absolute(reading.value) if loss else None,
            )
        )
    return found


def _guards(reading: Reading, gate: Gate) -> bool:
    tags = set(reading.tags)
    free = {"target", "recovery"} | ({"adoption"} if gate.adoption == "report" else set())
    return reading.meter in ("canary", "probe") and not tags & free
