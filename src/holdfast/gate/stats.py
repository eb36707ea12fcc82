"""Paired comparison of two models on the same items: estimate, bounds, verdict.

Orientation: higher is better. For a loss, the caller passes the negated values.

Each bound is one-sided at level `alpha`, so `[lower, upper]` is a two-sided interval of level
`1 - 2 alpha`: testing at the lower bound is exactly the one-sided non-inferiority test.

Sources: Miller 2024 (arXiv 2411.00640), clustered and paired errors of evaluations; Bell &
McCaffrey 2002 (Survey Methodology 28:169-181) and Kish 1965 (Survey Sampling), clusters of unlike
size; Tango 1998 (Statistics in Medicine 17:891-908), score interval of a paired difference of
proportions; Wilson 1927 (JASA 22:209-212), interval of one proportion; Hall 1992 (JRSS-B
54:221-228), removal of skewness by a monotone transformation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

FEW_CLUSTERS = 10
"""With fewer clusters than this that differ at all, their spread says little about the variance."""


class Verdict(StrEnum):
    """What the data say about a margin. "Not significant" is never a PASS."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class PairedDifference:
    """Mean of (after - before) over the same items, higher being better."""

    estimate: float
    lower: float
    """One-sided lower bound at level `alpha`; -inf (-1 for scores) where nothing can be said."""
    upper: float
    """One-sided upper bound at level `alpha`."""
    stderr: float
    """Standard error; for score intervals, half the interval's width over its z. nan: unknown."""
    alpha: float
    n: int
    """Items."""
    clusters: int
    """Independent groups of items; equals `n` where each item stands on its own."""
    method: str
    """How the bounds were computed: cluster t, Tango score, ..."""


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    *,
    clusters: Sequence[str] | None = None,
    alpha: float = 0.05,
    bounded: bool = False,
) -> PairedDifference:
    """Compare two readings of the same items, item by item.

    Args:
        before: value of each item under the base; higher is better.
        after: value of the same items, in the same order, under the tuned model.
        clusters: cluster of each item; items of a cluster are not independent. None: each alone.
        alpha: level of each one-sided bound, in (0, 0.5).
        bounded: the values are scores in 0..1 (accuracies) rather than losses.

    Method:
        losses: cluster-robust paired t, corrected for skewness (`_reach`), with degrees of freedom
            for clusters of unlike size (`_degrees`). Losses are continuous,
            so a difference of exactly zero on every item means that both models compute the same
            thing there, and the interval of zero width is then the right one.
        0/1 scores, no clusters: Tango's score interval; never of zero width, not even when no
            item changed (then it ends at -+ z^2 / (n + z^2)).
        other scores (clusters, graded scores): cluster-robust t; if fewer than `FEW_CLUSTERS`
            clusters changed, or the spread is zero, the wider of that and Tango's interval over
            clusters (each counted as risen or fallen), again never of zero width.

    A value that is not finite gives an estimate that is not finite, which fails every verdict.
    """
    _check_alpha(alpha)
    x, y = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"before and after must be two lists of one length: {x.shape}, {y.shape}")
    index = _cluster_index(clusters, len(x))
    groups = int(index.max()) + 1 if len(x) else 0
    if not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        nan = math.nan
        return PairedDifference(nan, nan, nan, nan, alpha, len(x), groups, "not finite")
    if bounded and (min(x.min(), y.min()) < 0 or max(x.max(), y.max()) > 1):
        raise ValueError("scores must lie in 0..1")

    difference_N = y - x
    estimate = float(difference_N.mean())
    if bounded and groups == len(x) and _is_binary(x) and _is_binary(y):
        fell, rose = int((difference_N < 0).sum()), int((difference_N > 0).sum())
        lower, upper = tango_bounds(fell, rose, len(x), alpha)
        stderr = (upper - lower) / (2 * _z(alpha))
        return PairedDifference(
            estimate, lower, upper, stderr, alpha, len(x), groups, "Tango score"
        )

    stderr = _clustered_stderr(difference_N, index)
    down, up = _reach(difference_N, index, alpha)
    lower, upper, method = estimate - down, estimate + up, "cluster t"
    if groups == len(x):
        method = "paired t"
    if bounded:
        lower, upper, widened = _widen_by_clusters(lower, upper, stderr, difference_N, index, alpha)
        if widened:
            method += ", widened by Tango on clusters"
            if groups > 1:
                stderr = max(stderr, (upper - lower) / (2 * _z(alpha)))
    return PairedDifference(estimate, lower, upper, stderr, alpha, len(x), groups, method)


def tango_bounds(fell: float, rose: float, n: float, alpha: float) -> tuple[float, float]:
    r"""Tango's (1998) bounds of `P(rose) - P(fell)`, each one-sided at level `alpha`.

    The bounds are the values `delta` at which the score statistic equals `+-z`:

        Z(delta) = (rose - fell - n delta) / sqrt(n (2 q + delta (1 - delta)))

    with `q` the maximum-likelihood `P(fell)` under `P(rose) = P(fell) + delta`, the larger root of

        2n q^2 + ((2n - rose + fell) delta - rose - fell) q - fell delta (1 - delta) = 0.
    """
    return _tango_lower(fell, rose, n, alpha), -_tango_lower(rose, fell, n, alpha)


def non_inferiority(difference: PairedDifference, margin: float) -> Verdict:
    """May we say that the fall is smaller than `margin`?

    PASS: the lower bound lies above `-margin`. FAIL: the upper bound lies below it. Otherwise
    INCONCLUSIVE: too few items to tell. Values that are not finite FAIL: the gate fails closed.
    """
    if not margin >= 0:
        raise ValueError(f"a margin is a number of at least 0, not {margin}")
    if not math.isfinite(difference.estimate):
        return Verdict.FAIL
    if difference.lower > -margin:
        return Verdict.PASS
    return Verdict.FAIL if difference.upper < -margin else Verdict.INCONCLUSIVE


def superiority(difference: PairedDifference) -> Verdict:
    """Did it rise? PASS: lower bound above 0. FAIL: upper bound at or below 0, or not finite."""
    if not math.isfinite(difference.estimate):
        return Verdict.FAIL
    if difference.lower > 0:
        return Verdict.PASS
    return Verdict.FAIL if difference.upper <= 0 else Verdict.INCONCLUSIVE


def items_needed(difference: PairedDifference, margin: float, power: float = 0.8) -> int | None:
    """Items of the same kind that would decide, if estimate and spread stay as they are.

        n' = n (stderr (z_{1-alpha} + z_power) / (estimate + margin))^2

    Normal approximation; clusters of the size seen. For a target, pass a margin of 0. None where
    it cannot be told: no spread, nothing finite, or an estimate exactly on the margin.
    """
    distance = difference.estimate + margin
    if not (math.isfinite(distance) and math.isfinite(difference.stderr)):
        return None
    if distance == 0 or difference.stderr <= 0:
        return None
    z = _z(difference.alpha) + _z(1 - power)
    needed = difference.n * (difference.stderr * z / distance) ** 2
    return max(1, math.ceil(needed)) if math.isfinite(needed) else None


def stderr_of_mean(values: ArrayLike, clusters: Sequence[str] | None = None) -> float:
    """Standard error of the mean of one reading's items.

    Clustered (Miller 2024, eq. 4), corrected for few clusters (`_cluster_sums`). For 0/1 values
    without spread (all right, all wrong) that would be 0, which nobody believes: then half the
    width of Wilson's 95 % interval over 1.96, `(z / (2 (G + z^2)))` at the ends. nan for fewer than
    two items or clusters of a loss, or where a value is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x) or not np.isfinite(x).all():
        return math.nan
    index = _cluster_index(clusters, len(x))
    groups = int(index.max()) + 1
    stderr = _clustered_stderr(x, index)
    if _is_binary(x) and not stderr > 1e-9:
        z, mean = _z(0.025), float(x.mean())
        return math.sqrt(mean * (1 - mean) / groups + (z / (2 * groups)) ** 2) / (
            1 + z * z / groups
        )
    return stderr


def _cluster_sums(values_N: Array, index_N: NDArray[np.intp]) -> Array:
    """(G,) residuals summed in each cluster, over `sqrt(1 - n_g / n)`; nan for a single cluster.

    The mean is drawn towards a cluster by its share of the items, which makes its residuals too
    small; this mends that exactly where values vary alike (CR2, Bell & McCaffrey 2002). With G
    clusters of one size it is the factor G / (G - 1) of the variance.
    """
    sizes_G = np.bincount(index_N)
    if len(sizes_G) < 2:
        return np.full(1, math.nan)
    sums_G = np.bincount(index_N, weights=values_N - values_N.mean())
    return np.asarray(sums_G / np.sqrt(1 - sizes_G / len(index_N)))


def _effective(index_N: NDArray[np.intp]) -> float:
    """Kish's effective number of clusters, `n^2 / sum n_g^2`: a large one counts as no more."""
    sizes_G = np.bincount(index_N)
    return len(index_N) ** 2 / float(sizes_G @ sizes_G)


def _degrees(index_N: NDArray[np.intp]) -> float:
    """Of `_clustered_stderr`: `(sum n_g^2)^2 / sum n_g^4 - 1`, with clusters of one size G - 1.

    Satterthwaite's, where the items of a cluster are wholly alike, so that its sum varies as n_g^2:
    the fewest there can be. Next to none where one cluster is most of the items: its own change
    could be anything, and the bound is then as good as none.
    """
    squares_G = np.bincount(index_N).astype(np.float64) ** 2
    return max(0.1, float(squares_G.sum() ** 2 / (squares_G @ squares_G)) - 1)


def _clustered_stderr(values_N: Array, index_N: NDArray[np.intp]) -> float:
    """`sqrt(sum_g s_g^2) / n` with the cluster sums s; nan for a single cluster."""
    sums_G = _cluster_sums(values_N, index_N)
    return math.sqrt(float(sums_G @ sums_G)) / len(values_N)


def _reach(values_N: Array, index_N: NDArray[np.intp], alpha: float) -> tuple[float, float]:
    """How far the lower bound lies below the mean, and the upper one above it; inf: unknown.

    Student's t, or Hall's (1992) where that is further: with few clusters of skewed differences (a
    few texts that got much worse) t passes too often on the side of the long tail. With g the
    skewness of the G cluster sums and a = g / sqrt(G), Hall's statistic is

        h(T) = T + a T^2 / 3 + a^2 T^3 / 27 + a / 6,   T = (mean - mu) / stderr

    and its inverse `3 / a ((1 + a (x - a / 6))^(1/3) - 1)`. With g = 0 it is t.
    """
    sums_G = _cluster_sums(values_N, index_N)
    groups = len(sums_G)
    if groups < 2:
        return math.inf, math.inf
    stderr, t = _clustered_stderr(values_N, index_N), _t(alpha, _degrees(index_N))
    spread = float(np.mean(sums_G**2))
    skewness = float(np.mean(sums_G**3)) / spread**1.5 if spread > 1e-30 else 0.0
    a = skewness / math.sqrt(groups)
    if abs(a) < 1e-6:
        return stderr * t, stderr * t
    down, up = (3 / a * (float(np.cbrt(1 + a * (x - a / 6))) - 1) for x in (t, -t))
    return stderr * max(t, down), stderr * max(t, -up)


def _widen_by_clusters(
    lower: float,
    upper: float,
    stderr: float,
    difference_N: Array,
    index_N: NDArray[np.intp],
    alpha: float,
) -> tuple[float, float, bool]:
    """Clip the bounds of scores to -1..1, and widen them where too few clusters changed.

    Kish's effective number of clusters stands in for their count.
    """
    sums_G = np.bincount(index_N, weights=difference_N)
    fell, rose = int((sums_G < -1e-9).sum()), int((sums_G > 1e-9).sum())
    few = fell + rose < FEW_CLUSTERS or not stderr > 1e-9
    if few:
        effective = _effective(index_N)
        share = effective / len(sums_G)
        bounds = tango_bounds(fell * share, rose * share, effective, alpha)
        lower, upper = min(lower, bounds[0]), max(upper, bounds[1])
    return max(lower, -1.0), min(upper, 1.0), few


def _tango_lower(fell: float, rose: float, n: float, alpha: float) -> float:
    """The `delta` below the estimate at which the score statistic equals `z`."""
    from scipy.optimize import brentq

    z = _z(alpha)

    def gap(delta: float) -> float:
        """Numerator minus z denominators: positive where `delta` is rejected as too low."""
        linear = (2 * n - rose + fell) * delta - rose - fell
        constant = -fell * delta * (1 - delta)
        q = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = max(2 * q + delta * (1 - delta), 0.0)
        return (rose - fell - n * delta) - z * math.sqrt(n * variance)

    # At the estimate itself the variance may vanish (nothing changed, everything changed), which
    # would be a root that says nothing; just below it the gap is negative.
    start = (rose - fell) / n - 1e-9
    return float(brentq(gap, -1.0, start, xtol=1e-12)) if start > -1.0 else -1.0


def _cluster_index(clusters: Sequence[str] | None, n: int) -> NDArray[np.intp]:
    """Each item's cluster as a number from 0; none given: each item on its own."""
    if clusters is None or not len(clusters):
        return np.arange(n, dtype=np.intp)
    if len(clusters) != n:
        raise ValueError(f"{n} items but {len(clusters)} clusters")
    number: dict[str, int] = {}
    return np.array([number.setdefault(c, len(number)) for c in clusters], dtype=np.intp)


def _is_binary(values_N: Array) -> bool:
    return bool(((values_N == 0) | (values_N == 1)).all())


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie in (0, 0.5), not {alpha}")


def _z(alpha: float) -> float:
    """Upper `alpha` quantile of the normal."""
    from scipy.special import ndtri

    return -float(ndtri(alpha))


def _t(alpha: float, degrees: float) -> float:
    """Upper `alpha` quantile of Student's t."""
    from scipy.special import stdtrit

    quantile: Any = stdtrit(degrees, alpha)
    return -float(quantile)
