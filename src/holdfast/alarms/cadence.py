"""How often: checks take no more than their share of the time.

With c seconds a check and t a step, the checks' share of the time is c / (c + N t) <= share from
N >= c (1 - share) / (share t) on. N is rounded up to a coarse grid, so that most repetitions of a
run on one machine choose the same, and is kept in a file, so that a resumed run does.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import TypeVar

from holdfast.files import write_text

T = TypeVar("T")

FIRST = 10
"""Step of the first check, where N is not given; N is chosen there."""
SKIPPED = 2
"""Steps at the start whose time says nothing of later ones."""
GRID = (1, 2, 3, 5, 7)
"""Numbers of steps, times powers of ten."""


class Cadence:
    """Which steps are checked.

    Args:
        every: steps between checks; None: to be chosen.
        share: of the time, where it is chosen.
        kept: the file that holds the choice; None: it is not kept.
    """

    def __init__(self, every: int | None, share: float, kept: Path | None = None) -> None:
        self.every, self.share, self.kept = every, share, kept
        self.pinned = every is not None
        self._since: float | None = None
        self._steps: list[float] = []
        if not self.pinned and kept is not None and kept.is_file():
            self.every = int(json.loads(kept.read_text(encoding="utf-8"))["every"])

    def due(self, step: int) -> bool:
        """Whether this step is followed by a check."""
        if self.pinned:
            assert self.every is not None
            return step % self.every == 0
        if step <= FIRST or self.every is None:
            return step == FIRST
        return step % self.every == 0

    def step_done(self) -> None:
        """A step has ended: note how long it took."""
        now = time.perf_counter()
        if self._since is not None:
            self._steps.append(now - self._since)

    def resume_clock(self) -> None:
        """The next step begins."""
        self._since = time.perf_counter()

    def choose(self, check: float) -> str | None:
        """Choose N once, a check having taken so many seconds. Returns what to tell the user."""
        if self.every is not None or not self._steps:
            return None
        step = statistics.median(self._steps[SKIPPED:] or self._steps)
        every = agreed(steps_between(check, step, self.share))
        self.every = every
        if self.kept is not None:
            record = {"every": every, "seconds_check": check, "seconds_step": step}
            write_text(self.kept, json.dumps(record) + "\n")
        return (
            f"alarms: a check took {check:.2g} s and a step {step:.2g} s, so checks are {every} "
            f"steps apart; alarms.every={every} repeats this on any machine"
        )


def steps_between(check: float, step: float, share: float) -> int:
    """The least number of the grid that keeps checks within their share of the time."""
    least = check * (1 - share) / (share * max(step, 1e-9))
    power = 1
    while True:
        for digit in GRID:
            if digit * power >= least:
                return digit * power
        power *= 10


def agreed(value: T) -> T:
    """The first process's value, on all of them."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]
