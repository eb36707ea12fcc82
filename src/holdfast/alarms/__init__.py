"""Alarms while training goes on (docs/alarms.md).

rules.py       the recipe's `alarms` section: which rule, how often, what is done
guardrails.py  what is watched: its items in disjoint blocks, and the fall that is accepted
sentry.py      what a check reads and what follows from it, at a known rate of false alarms
wiring.py      what no fall of a guardrail shows, or not soon: faults in how the run is put together
cadence.py     how often, so that checks take no more than their share of the time
actions.py     who is told of an alarm
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Alarm:
    """Something that should not be so, and that no chance explains."""

    name: str
    """`canary/DOMAIN`, `probe/NAME` or `wiring/FAULT`."""
    text: str
    """What was seen, and what to look at."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
