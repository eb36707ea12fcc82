"""The base's distribution at one position as a few bytes: which tokens are stored, and how.

Shape suffixes: M positions, E listed entries, S drawn ones, both without the next tokens.

A position *lists* every token likelier than 1 / draws, always the next token of the row, and at
least the fewest tokens that hold `mass` of the base's probability, as far as `max_entries` allows.
What is left is the tail: its mass T, and some of its tokens, each drawn with probability
pi_j = min(1, draws p_j): of all designs of that many tokens the one of least variance where the
tuned model is off by the same share everywhere (Neyman 1934). A sum over the tail is
estimated without bias by the sum over the drawn ones with weights 1 / pi_j, so the shape of the
tail, which a list of any length cuts off, is kept on average over positions. Only the difference
from the tuned model is weighted, so that the noise is 0 where there is none.

The kinds of numbers lie in columns of their own, each among its own kind compresses best:

    counts, draws  (M,)  listed entries besides the next token, and drawn ones
    gaps, leaps    (E,) (S,)  tokens ranked by how often they are stored; the ranks of a position
                   ascend, and what is stored is how many were skipped: mostly small numbers
    levels, ratios (E,) (S,)  the entry's probability; and log(1 / pi) of a drawn one
    nexts          (M,)  the next token's probability; which token it is, the row itself says
    tails          (M,)  T

A probability p is stored as a whole number: linear above p = KNEE / resolution, where a gradient
(q - p) W wants an equal absolute error everywhere, and logarithmic below, where that would round
everything to 0. Rounding breaks the sum over listed entries and tail, so reading divides all of
them by it: each takes its proportional share of the residual, and the sum is 1 again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.errors import RequestError

Array = NDArray[Any]

KNEE = 4
"""Levels of the linear part that the logarithmic part takes over; its step is 1 / KNEE nats."""
RATIO_STEPS = 8
"""Steps a nat of log(1 / pi)."""
LOWEST = 80
"""Levels of the logarithmic part: down to KNEE / resolution * exp(-LOWEST / KNEE + 1)."""


@dataclass(frozen=True)
class Settings:
    """How much of each distribution is kept."""

    mass: float = 0.05
    """Probability that the listed tokens hold, between 0 and 1; fewer where `max_entries` cuts."""
    max_entries: int = 128
    """Tokens listed at most, 1 to 128, the next token and those likelier than 1 / draws aside."""
    draws: int = 12
    """Tokens drawn of the tail for its mass: draws * T of them, 0 to 128. 0: its mass alone."""
    resolution: int = 128
    """Levels of the linear part between 0 and 1; more are finer."""
    temperature: float = 1.0
    """What the logits are divided by; training must use the same."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.mass < 1:
            problems.append(f"mass: {self.mass:g} is not between 0 and 1; give one such as 0.9")
        if not 1 <= self.max_entries <= 128:
            problems.append(
                f"max_entries: {self.max_entries} is not in 1 to 128; give one such as 128"
            )
        if not 0 <= self.draws <= 128:
            problems.append(f"draws: {self.draws} is not in 0 to 128; give one such as 12")
        if not 16 <= self.resolution <= 32768:
            problems.append(
                f"resolution: {self.resolution} is not in 16 to 32768; give one such as 128"
            )
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            problems.append(f"temperature: {self.temperature:g} is not above 0; give 1.0")
        if problems:
            raise RequestError(*problems)

    @cached_property
    def log_levels(self) -> NDArray[np.float64]:
        """Log-probability of each level; level 0 is probability 0."""
        linear = np.log(np.arange(KNEE, self.resolution + 1) / self.resolution)
        below = np.arange(1 - LOWEST, KNEE) / KNEE - 1 + math.log(KNEE / self.resolution)
        return np.concatenate([[-np.inf], below, linear])

    def level(self, logp: Array) -> NDArray[np.uint16]:
        """The nearest level of log-probabilities; 0 for -inf alone."""
        scaled = np.exp(logp, dtype=np.float64) * self.resolution
        with np.errstate(divide="ignore"):
            below = KNEE * (1 + logp.astype(np.float64) - math.log(KNEE / self.resolution))
        level = np.where(scaled >= KNEE, scaled, below).round() + LOWEST
        level = np.clip(level, 1, self.resolution + LOWEST)
        return np.where(np.isneginf(logp), 0, level).astype(np.uint16)


@dataclass(frozen=True)
class Stored:
    """Distributions before encoding: what the base's forward pass leaves of its logits."""

    counts: Array
    """(M,) listed entries besides the next token."""
    ids: Array
    """(E,) their token ids, in any order within a position."""
    logp: Array
    """(E,)"""
    next_logp: Array
    """(M,) log-probability of the row's next token."""
    log_tail: Array
    """(M,) log T = log(1 - P); -inf where nothing is left."""
    draws: Array
    """(M,) tokens drawn from the tail."""
    drawn_ids: Array
    """(S,)"""
    drawn_logp: Array
    """(S,)"""


@dataclass(frozen=True)
class Read:
    """Distributions as they are read: of each position the next token, the listed, the drawn."""

    counts: Array
    """(M,) entries, at least 1."""
    ids: Array
    """(E + S + M,) int64."""
    logp: Array
    """(E + S + M,) fp32."""
    weights: Array
    """(E + S + M,) fp32: 1 / pi of a drawn token, 0 for a listed one."""
    log_tail: Array
    """(M,) fp32; the listed and the tail sum to 1, the drawn are part of the tail."""


COLUMNS = {
    "counts": "position",
    "gaps": "entry",
    "levels": "entry",
    "nexts": "position",
    "tails": "position",
    "draws": "position",
    "leaps": "draw",
    "ratios": "draw",
}
"""What a value of each column belongs to."""


def frequent_first(ids: Array) -> NDArray[np.uint32]:
    """The tokens that occur, the most frequent first: what the ranks count."""
    tokens, counts = np.unique(ids, return_counts=True)
    order: NDArray[np.uint32] = tokens[np.argsort(-counts, kind="stable")].astype(np.uint32)
    return order


def encode(stored: Stored, order: Array, settings: Settings) -> dict[str, Array]:
    """The columns of `stored`; `order` holds every token in it."""
    rank = np.zeros(int(order.max(initial=0)) + 1, np.int64)
    rank[order] = np.arange(len(order))
    kind = np.uint16 if len(order) <= 1 << 16 else np.uint32
    gaps, by_rank = _gaps(rank[stored.ids], stored.counts)
    leaps, drawn_by_rank = _gaps(rank[stored.drawn_ids], stored.draws)
    ratio = -math.log(max(1, settings.draws)) - stored.drawn_logp[drawn_by_rank]
    return {
        "counts": stored.counts.astype(np.uint8),
        "gaps": gaps.astype(kind),
        "levels": settings.level(stored.logp[by_rank]),
        "nexts": settings.level(stored.next_logp),
        "tails": settings.level(stored.log_tail),
        "draws": stored.draws.astype(np.uint8),
        "leaps": leaps.astype(kind),
        "ratios": (ratio * RATIO_STEPS).round().clip(0, 255).astype(np.uint8),
    }


def decode(columns: dict[str, Array], next_ids: Array, order: Array, settings: Settings) -> Read:
    """The distributions at the positions of the columns; `next_ids` (M,) are the row's own."""
    table = settings.log_levels
    counts, draws = (columns[name].astype(np.int64) for name in ("counts", "draws"))
    position = np.arange(len(counts))
    listed = np.concatenate([position, np.repeat(position, counts)])
    logp = np.concatenate([table[columns["nexts"]], table[columns["levels"]]])
    log_tail = table[columns["tails"]]
    total = np.bincount(listed, np.exp(logp), len(counts)) + np.exp(log_tail)
    log_total = np.log(total)
    log_tail = log_tail - log_total
    drawn = np.repeat(position, draws)
    ratio = columns["ratios"] / RATIO_STEPS
    drawn_logp = -math.log(max(1, settings.draws)) - ratio
    ids = [next_ids, order[_ranks(columns["gaps"], counts)], order[_ranks(columns["leaps"], draws)]]
    by_position = np.argsort(np.concatenate([listed, drawn]), kind="stable")
    weights = np.concatenate([np.zeros(len(listed)), np.exp(ratio)])
    return Read(
        counts + draws + 1,
        np.concatenate(ids).astype(np.int64)[by_position],
        np.concatenate([logp - log_total[listed], drawn_logp])[by_position].astype(np.float32),
        weights[by_position].astype(np.float32),
        log_tail.astype(np.float32),
    )


def _gaps(ranks: Array, counts: Array) -> tuple[Array, Array]:
    """How many ranks each entry skips from the one before in its position, and their order."""
    by_rank = np.lexsort((ranks, np.repeat(np.arange(len(counts)), counts)))
    ranks = ranks[by_rank]
    gaps = np.diff(ranks, prepend=-1) - 1
    first = (np.cumsum(counts) - counts)[counts > 0]
    gaps[first] = ranks[first]
    return gaps, by_rank


def _ranks(gaps: Array, counts: Array) -> Array:
    """What `_gaps` was made from."""
    ranks = np.cumsum(gaps.astype(np.int64) + 1)
    before = np.concatenate([[0], ranks])[np.cumsum(counts) - counts]
    result: Array = ranks - np.repeat(before, counts) - 1
    return result
