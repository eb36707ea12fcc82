"""What a check reads, and what follows from it, at a known rate of false alarms.

While a guardrail has blocks that were not read yet, each check reads the next one and bets on it
(`gate.sequential.update`). When they are used up, all n blocks are read together at every n-th
check, which costs as much, and are tested at a spent level (`reused_alarm`). Each of the two has
half of alpha; all guardrails count from the first check to the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.alarms import Alarm
from holdfast.alarms.guardrails import Guardrail
from holdfast.alarms.rules import Alarms
from holdfast.gate.sequential import Evidence, alarms, reused_alarm, update
from holdfast.gate.stats import stderr_of_mean
from holdfast.meters import Reading
from holdfast.meters.canary import read_canary
from holdfast.meters.probes import read_probes

if TYPE_CHECKING:
    from holdfast.measure import Measure

Wanted = Mapping[str, Sequence[str]]
"""Items to read, by guardrail."""


@dataclass
class Sentry:
    """What is held against each guardrail so far."""

    guardrails: Sequence[Guardrail]
    rule: Alarms
    checks: int = 0
    """Checks done."""
    evidence: dict[str, Evidence] = field(default_factory=dict)
    raised: set[str] = field(default_factory=set)
    """Alarms are raised once."""

    def __post_init__(self) -> None:
        self.evidence = {g.key: Evidence() for g in self.guardrails} | self.evidence

    def resume(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take up where the lines of `alarms.jsonl` end."""
        for line in lines:
            self.raised.update(alarm["name"] for alarm in line["alarms"])
        if lines:
            self.checks = lines[-1]["checks"]
            kept = lines[-1]["evidence"]
            self.evidence |= {name: Evidence.from_dict(one) for name, one in kept.items()}

    def as_dict(self) -> dict[str, Any]:
        """What `resume` needs beside the alarms; plain JSON values."""
        kept = {name: one.as_dict() for name, one in self.evidence.items()}
        return {"checks": self.checks, "evidence": kept}

    def wanted(self) -> Wanted:
        """What the next check reads."""
        turns = {g.key: _turn(g, self.checks)[0] for g in self.guardrails}
        return {key: items for key, items in turns.items() if items}

    def check(self, found: Sequence[Reading], step: int) -> tuple[list[Reading], list[Alarm]]:
        """Judge what was read of `wanted()`.

        Returns:
            Of each guardrail that was read its mean `fall`, with its error, and the `evidence` so
            far as a share of what raises an alarm; and the alarms that were not raised before.
        """
        by_key = {f"{reading.meter}/{reading.name}": reading for reading in found}
        readings, shown = [], set[str]()
        for g in self.guardrails:
            items, reused = _turn(g, self.checks)
            if not items:
                continue
            now = g.after(by_key[g.key])
            before, after = [g.before[i] for i in items], [now[i] for i in items]
            clusters = [g.clusters[i] for i in items]
            accepted = g.accepted(step, self.rule.rate)
            if reused:
                lost = reused_alarm(
                    before,
                    after,
                    margin=accepted,
                    check=reused,
                    probes=len(self.guardrails),
                    alpha=self.rule.alpha / 2,
                    clusters=clusters,
                    bounded=g.margin is None,
                )
                shown |= {g.key} if lost else set()
            else:
                self.evidence[g.key] = update(
                    self.evidence[g.key],
                    before,
                    after,
                    margin=accepted,
                    clip=g.clip,
                    clusters=clusters,
                )
            readings.append(_fall(g, before, after, clusters, step))
        self.checks += 1
        shown |= set(alarms(self.evidence, self.rule.alpha / 2)) if self.evidence else set()
        fresh = sorted(shown - self.raised)
        self.raised |= shown
        falls = {reading.name: reading for reading in readings}
        raised = [Alarm(key, self._text(key, falls.get(key), step)) for key in fresh]
        return [*readings, *(self._evidence(r, step) for r in readings)], raised

    def _evidence(self, fall: Reading, step: int) -> Reading:
        share = self.evidence[fall.name].peak / math.log(2 * len(self.guardrails) / self.rule.alpha)
        return Reading("evidence", fall.name, "selection", step, share, None, fall.n, "alarms")

    def _text(self, key: str, fall: Reading | None, step: int) -> str:
        g = next(g for g in self.guardrails if g.key == key)
        if self.evidence[key].broken:
            return f"{key}: the model's likelihoods are not numbers any more"
        of = f"at most {self.rule.alpha:g} over {len(self.guardrails)} guardrails and all checks"
        accepted = g.accepted(step, self.rule.rate)
        if g.margin is None:
            limit = f"faster than {self.rule.fall} per 1000 steps ({100 * accepted:.2g}pt by now)"
        else:
            limit = f"by more than its margin of {accepted:.3g} nats"
        last = ""
        if fall is not None:
            scale, unit = (100, "pt") if g.margin is None else (1, " nats")
            error = "" if fall.stderr is None else f" ± {scale * fall.stderr:.2g}"
            last = f"; the last {fall.n} items: {scale * fall.value:.3g}{error}{unit}"
        verb = "falls" if g.margin is None else "has risen"
        return f"{key} {verb} {limit}{last} (chance of a false alarm {of})"


def read_wanted(measure: Measure, model: Any, step: int, wanted: Wanted) -> list[Reading]:
    """Read these items of the canary and the probes, and no others."""
    documents = [d for d in measure.canary if d.id in wanted.get(f"canary/{d.domain}", ())]
    items = [i for i in measure.items if i.id in wanted.get(f"probe/{i.probe}", ())]
    run_code = measure.run_generated_code
    return [
        *read_canary(model, documents, "selection", step),
        *read_probes(model, measure.tokenizer, items, step, run_generated_code=run_code),
    ]


def _turn(g: Guardrail, check: int) -> tuple[Sequence[str], int]:
    """What check number `check` (from 0) reads, and how often that was read together by then."""
    blocks, late = len(g.blocks), check - len(g.blocks)
    if late < 0:
        return g.blocks[check], 0
    if late % blocks != blocks - 1:
        return (), 0
    return [item for block in g.blocks for item in block], late // blocks + 1


def _fall(
    g: Guardrail,
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[str],
    step: int,
) -> Reading:
    """Mean fall of the items, in the guardrail's unit: points of an accuracy, nats of a loss."""
    falls = [x - y for x, y in zip(before, after, strict=True)]
    stderr = stderr_of_mean(falls, clusters)
    mean = math.fsum(falls) / len(falls) if all(map(math.isfinite, falls)) else math.nan
    return Reading("fall", g.key, "selection", step, mean, stderr, len(falls), g.unit)
