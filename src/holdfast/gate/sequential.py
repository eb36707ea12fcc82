"""Alarms while training goes on: looked at as often as wanted, at a known rate of false ones.

For each probe, the null is: *at every step that was looked at, the mean fall is at most the
margin*. Against it a bettor plays on each fresh item, with fall d clipped to [-c, c] and a bet
that rests on earlier items only:

    E_t = prod_i (1 + lambda_i (d_i - m)),      0 <= lambda_i <= CAP / (c + m)

Under the null E is a supermartingale that begins at 1, so that P(E ever reaches 1 / alpha) <= alpha
(Ville): one may look after every block, and stop. The bets are the approximate growth-optimal ones:

    lambda_i = (mean - m) / (variance + (mean - m)^2),   clipped, of the items before i

with earlier blocks forgotten by and by, so that a fall that sets in late is bet on soon.

This holds on *fresh* items only: of an item read before, the next fall is known. For items that are
read again there is `reused_alarm`, which spends alpha over the checks.

Sources: Waudby-Smith & Ramdas 2023 (JRSS-B 86:1-27, arXiv 2010.09686), betting and aGRAPA;
Vovk & Wang 2021 (Annals of Statistics 49:1736), e-values; Holm 1979 (Scand. J. Statist. 6:65).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.gate.stats import Verdict, non_inferiority, paired_difference

Array = NDArray[np.float64]

CAP = 0.5
"""Share of what a bet may lose at most: wealth is never halved by one item."""
DECAY = 0.7
"""What the bets remember of earlier blocks, a block later. Any value is valid."""
PRIOR = 2.0
"""Items' worth of belief that the fall is the margin, before anything was seen."""


@dataclass(frozen=True)
class Evidence:
    """What is held against one probe so far; plain numbers, so that a resumed run goes on."""

    log_e: float = 0.0
    """Natural logarithm of the e-value now."""
    peak: float = 0.0
    """The highest that `log_e` ever was; exp(-peak) is a p-value that may be looked at any time."""
    weight: float = 0.0
    """Items that the bets remember, and below the sums of their falls and of the squares."""
    total: float = 0.0
    squares: float = 0.0
    items: int = 0
    """Items (clusters) seen in all."""
    blocks: int = 0
    broken: bool = False
    """A value was not finite: an alarm in itself, and for good."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats survive JSON to the last bit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Evidence:
        """What `as_dict` gave. Raises ValueError for anything else."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        fits = record.keys() == kinds.keys() and all(
            type(value) is kinds[name] for name, value in record.items()
        )
        if not fits or not all(map(math.isfinite, record.values())):
            raise ValueError(f"not the evidence of an alarm: {dict(record)}")
        return cls(**record)


def allowed_fall(step: int, rate: float = 0.015) -> float:
    """The margin of a rule by speed: at most `rate` per 1000 steps since step 0."""
    return rate * step / 1000


def update(
    evidence: Evidence,
    before: ArrayLike,
    after: ArrayLike,
    *,
    margin: float,
    clip: float = 1.0,
    clusters: Sequence[str] | None = None,
) -> Evidence:
    """Play one fresh block.

    Args:
        evidence: after the blocks before; `Evidence()` at the start.
        before: (N,) value of each item under the base; higher is better (negate a loss).
        after: (N,) of the same items under the model now.
        margin: mean fall that is still accepted at this step, in the unit of the values. It must
            not depend on this block.
        clip: an item counts for a fall or rise of at most so much; 1 leaves accuracies as they are.
            The null is about the mean of the clipped falls.
        clusters: cluster of each item. A cluster is played as one: the mean of its items.

    Raises:
        ValueError: the margin is negative, or so large that no clipped fall is beyond it.
    """
    if not 0 <= margin < clip:
        raise ValueError(f"a margin lies in 0..clip ({clip}), not {margin}")
    x, y = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"before and after must be two lists of one length: {x.shape}, {y.shape}")
    if not len(x):
        return evidence
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return replace(evidence, broken=True, blocks=evidence.blocks + 1)
    fall_N: Array = np.clip(x - y, -clip, clip)
    if clusters is not None and len(clusters):
        if len(clusters) != len(fall_N):
            raise ValueError(f"{len(fall_N)} items but {len(clusters)} clusters")
        index_N = np.unique(np.asarray(clusters), return_inverse=True)[1]
        fall_N = np.bincount(index_N, weights=fall_N) / np.bincount(index_N)

    total_N = evidence.total + np.cumsum(fall_N)
    squares_N = evidence.squares + np.cumsum(fall_N**2)
    weight_N: Array = evidence.weight + np.arange(len(fall_N), dtype=np.float64)
    bet_N = _bets(weight_N, total_N - fall_N, squares_N - fall_N**2, margin, clip)
    log_e_N = evidence.log_e + np.cumsum(np.log1p(bet_N * (fall_N - margin)))
    return Evidence(
        log_e=float(log_e_N[-1]),
        peak=max(evidence.peak, float(log_e_N.max())),
        weight=DECAY * (evidence.weight + len(fall_N)),
        total=DECAY * float(total_N[-1]),
        squares=DECAY * float(squares_N[-1]),
        items=evidence.items + len(fall_N),
        blocks=evidence.blocks + 1,
        broken=evidence.broken,
    )


def _bets(
    weight_N: Array,
    total_N: Array,
    squares_N: Array,
    margin: float,
    clip: float,
) -> Array:
    """The bet on each item, from what was seen before it: zero where no fall is in sight."""
    mean_N = (PRIOR * margin + total_N) / (PRIOR + weight_N)
    # at the start a spread of half the reach, so that the first bets are small
    second_N = (PRIOR * (margin**2 + clip**2 / 4) + squares_N) / (PRIOR + weight_N)
    excess_N = mean_N - margin
    variance_N = np.maximum(second_N - mean_N**2, 0.0)
    bet_N = excess_N / np.maximum(variance_N + excess_N**2, 1e-12)
    return np.clip(bet_N, 0.0, CAP / (clip + margin))


def alarms(evidence: Mapping[str, Evidence], alpha: float = 0.05) -> tuple[str, ...]:
    """The probes for which the null is given up, the surest first: Holm's rule on the peaks.

    The first of K needs E >= K / alpha, the next (K - 1) / alpha, and so on. Over all K probes and
    all looks together, P(any alarm on a probe whose null holds) <= alpha, however the probes depend
    on each other. K is all probes that are watched, from the first look to the last. A broken one
    is always named.
    """
    _check_alpha(alpha)
    broken = [name for name, one in evidence.items() if one.broken]
    rest = sorted(evidence.keys() - set(broken), key=lambda name: (-evidence[name].peak, name))
    for place, name in enumerate(rest):
        if evidence[name].peak < math.log((len(evidence) - place) / alpha):
            return (*broken, *rest[:place])
    return (*broken, *rest)


def fresh_blocks(
    items: Sequence[str], size: int, *, clusters: Mapping[str, str] | None = None, seed: int = 0
) -> list[list[str]]:
    """Items in disjoint blocks of at least `size` in random order; a cluster is never split.

    What does not fill a block joins the last one. The same arguments give the same blocks, so a
    resumed run needs to know only how many it has used. When they are used up, what is read again
    is no evidence for `update`: see `reused_alarm`.
    """
    if size < 1:
        raise ValueError(f"a block has at least 1 item, not {size}")
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault((clusters or {}).get(item, item), []).append(item)
    names = sorted(groups)
    found: list[list[str]] = []
    block: list[str] = []
    for index in np.random.default_rng(seed).permutation(len(names)):
        block.extend(groups[names[index]])
        if len(block) >= size:
            found.append(block)
            block = []
    if block and found:
        found[-1].extend(block)
    elif block:
        found.append(block)
    return found


def spent(alpha: float, check: int) -> float:
    """The part of alpha that check number `check` (from 1) may use: 6 / (pi check)^2 of it."""
    _check_alpha(alpha)
    if check < 1:
        raise ValueError(f"checks are counted from 1, not {check}")
    return alpha * 6 / (math.pi * check) ** 2


def reused_alarm(
    before: ArrayLike,
    after: ArrayLike,
    *,
    margin: float,
    check: int,
    probes: int,
    alpha: float = 0.05,
    clusters: Sequence[str] | None = None,
    bounded: bool = True,
) -> bool:
    """Whether a fall beyond the margin is shown on items that were read before.

    The gate's own test, at the level `spent(alpha, check) / probes`: over all checks and probes
    these add up to at most alpha (union bound), whether or not items are read again. It is as
    exact as the test is at so small a level, and it asks for more the later the check.

    Args:
        check: how many checks there were of this probe, this one included.
        probes: how many are watched.
        bounded: the values are scores in 0..1.
    """
    if probes < 1:
        raise ValueError(f"at least 1 probe is watched, not {probes}")
    level = spent(alpha, check) / probes
    found = paired_difference(before, after, clusters=clusters, alpha=level, bounded=bounded)
    return non_inferiority(found, margin) is Verdict.FAIL


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie in (0, 0.5), not {alpha}")
