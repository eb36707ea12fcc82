"""Faults in how a run is put together, which no fall of a guardrail shows, or not soon.

Each check is cheap and certain: what it looks for cannot happen in a run that does as its recipe
says, so that none of them has a rate of false alarms. The two that compare texts ask for a gap far
beyond what documents of one kind differ by.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.alarms import Alarm
from holdfast.gate.stats import stderr_of_mean

Texts = Sequence[Sequence[int]]
"""Documents as token ids."""

NO_KL = 1e-7
"""Nats a token below which a divergence is rounding."""
SURELY_MOVED = 1e-3
"""Relative displacement of the weights that surely shows in the divergence: at 1 % of it, the
lab's is 3e-3 nats, and it falls with the square."""
ALL = 0.99
"""Share of a row's tokens that is all of them."""
OTHER_SHARE = 0.15
"""Share of trained tokens off the recipe's that no draw of rows explains."""
FEW_TEXTS = 8
"""Texts below which nothing is said of their kind."""
NEARER, FURTHER = 0.25, 1.0
"""Nats a token of a unigram model: nearer to another domain by this; further from its own."""
ERRORS = 6.0
"""Standard errors that a gap between texts must have."""
SMOOTHING = 100.0
"""Tokens' worth of the pooled distribution in each domain's."""


@dataclass(frozen=True)
class Wires:
    """What a run can tell of itself at a check; what it cannot is left at its default."""

    step: int
    moved: float
    """||W - W0|| over the trained weights."""
    relative: float = 0.0
    """The same over ||W0||, of the weights that `kl` was read with."""
    rate: float = 0.0
    """A learning rate that was used."""
    kl: float | None = None
    """Mean divergence from the base on the step's anchor rows, nats a token."""
    trained: float | None = None
    """Share of the lesson's tokens that bear a loss, in the last steps."""
    expected: float | None = None
    """The same of the lesson as it was encoded."""
    prompted: bool = False
    """Whether the lesson's rows have a prompt, which is not trained on."""
    served: Mapping[str, Texts] = field(default_factory=dict)
    """Rows that were replayed lately, by domain."""
    canary: Mapping[str, Texts] = field(default_factory=dict)
    """Held-out texts, by domain."""


def faults(wires: Wires) -> list[Alarm]:
    """The faults that show."""
    found = {name: check(wires) for name, check in CHECKS.items()}
    return [Alarm(f"wiring/{name}", text) for name, text in found.items() if text]


def nothing_moves(wires: Wires) -> str | None:
    """An adapter of rank or scale zero, frozen weights, updates lost in rounding."""
    if wires.moved != 0 or wires.rate <= 0:
        return None
    return (
        f"after {wires.step} steps at learning rates up to {wires.rate:.2g} no trained weight has "
        "changed what the model computes: look at the adapter's rank and scale, at what is frozen, "
        "at refused steps, and at weights too coarse for so small a rate"
    )


def base_is_tuned(wires: Wires) -> str | None:
    """The base reference points at the model that is trained: its divergence stays zero."""
    if wires.kl is None or wires.relative < SURELY_MOVED or abs(wires.kl) > NO_KL:
        return None
    return (
        f"the divergence from the base is {wires.kl:.1g} nats though the weights have moved by "
        f"{100 * wires.relative:.2g} %: the reference is the model that is trained, not its base"
    )


def prompts_trained(wires: Wires) -> str | None:
    """Labels are not masked to the response."""
    if wires.trained is None:
        return None
    if wires.prompted and wires.trained > ALL:
        return (
            f"{100 * wires.trained:.0f} % of the lesson's tokens bear a loss though its rows have "
            "prompts: the labels are not masked to the response; look at the chat template"
        )
    if wires.expected is not None and abs(wires.trained - wires.expected) > OTHER_SHARE:
        return (
            f"{100 * wires.trained:.0f} % of the lesson's tokens bear a loss where its rows have "
            f"{100 * wires.expected:.0f} %: batches are not masked as the rows are"
        )
    return None


def replay_strays(wires: Wires) -> str | None:
    """Replay of a domain serves rows that are not like its canary."""
    if not wires.served:
        return None
    kinds = _Kinds.of([*wires.canary.items(), *wires.served.items()])
    own = {
        domain: Counter(t for text in texts for t in text) for domain, texts in wires.canary.items()
    }
    for domain, texts in sorted(wires.served.items()):
        if domain not in own or min(len(texts), len(wires.canary[domain])) < FEW_TEXTS:
            continue
        mine = [kinds.nats(text, own[domain]) for text in texts]
        for other in sorted(own.keys() - {domain}):
            theirs = [kinds.nats(text, own[other]) for text in texts]
            nearer = [m - t for m, t in zip(mine, theirs, strict=True)]
            if _mean(nearer) > max(NEARER, ERRORS * stderr_of_mean(nearer)):
                return (
                    f"the rows replayed as '{domain}' are like the canary of '{other}', by "
                    f"{_mean(nearer):.2g} nats a token: look at levers.replay's sources and domains"
                )
        held = [kinds.nats(text, own[domain] - Counter(text)) for text in wires.canary[domain]]
        error = math.hypot(stderr_of_mean(mine), stderr_of_mean(held))
        if (gap := _mean(mine) - _mean(held)) > max(FURTHER, ERRORS * error):
            return (
                f"the rows replayed as '{domain}' are unlike its canary, by {gap:.2g} nats a "
                "token: look at levers.replay's sources and domains"
            )
    return None


CHECKS: dict[str, Callable[[Wires], str | None]] = {
    "nothing_moves": nothing_moves,
    "base_is_tuned": base_is_tuned,
    "prompts_trained": prompts_trained,
    "replay_strays": replay_strays,
}
"""Each by the name of its alarm."""


@dataclass(frozen=True)
class _Kinds:
    """Unigram models, each smoothed with the distribution of all texts together."""

    pooled: Counter[int]
    total: int

    @classmethod
    def of(cls, domains: Sequence[tuple[str, Texts]]) -> _Kinds:
        pooled = Counter(t for _, texts in domains for text in texts for t in text)
        return cls(pooled, pooled.total())

    def nats(self, text: Sequence[int], counts: Counter[int]) -> float:
        """Nats a token of a text under the domain with these counts."""
        size = counts.total() + SMOOTHING
        return -_mean(
            [math.log((counts[t] + SMOOTHING * self.pooled[t] / self.total) / size) for t in text]
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
