"""An order of rows in which any few of them, one after the other, are like all of them together.

Source: herding, Welling 2009 (ICML); as an order of training rows, Lu et al. 2022 (arXiv
2205.10733), who balance gradients where this balances words, which cost no pass of a model.
Equation: next comes argmin_i |v_1 + ... + v_(t-1) + v_i|^2 over the rows that are left, where
v_i = n_i (y_i - mean y): a row of n_i tokens counts as often, since a step takes tokens.
y_i is the square root of each token's share of the row (so that distances are Hellinger's), on the
`DIRECTIONS` in which the rows differ most.

Shape suffixes: n rows, V tokens of the vocabulary that occur, K directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIRECTIONS = 16
"""Of four, twice the variance of a step's mix is left (docs/log.md)."""
POOL = 2048
"""Rows among which the next one is looked for: the time grows with n POOL, not with n^2."""


def directions(rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """The rows' v, (n, K); they sum to zero. K is 0 where the rows have nothing to differ in."""
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import svds

    lengths = np.array([len(row) for row in rows])
    _, tokens = np.unique(np.concatenate([np.asarray(row) for row in rows]), return_inverse=True)
    row_of = np.repeat(np.arange(len(rows)), lengths)
    counts_nV = csr_array((np.ones(len(tokens)), (row_of, tokens)))
    counts_nV.sum_duplicates()
    roots_nV = (counts_nV / lengths[:, None]).sqrt().tocsr()
    K = min(DIRECTIONS, *(size - 1 for size in roots_nV.shape))
    if K < 1:
        return np.zeros((len(rows), 0))
    start = np.ones(min(roots_nV.shape))
    _, _, main_KV = svds(roots_nV, k=K, v0=start)
    y_nK = roots_nV @ main_KV.T
    mean_K: Any = np.average(y_nK, axis=0, weights=lengths)
    return np.asarray(lengths[:, None] * (y_nK - mean_K))


def herded(v_nK: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of the rows; `random` says which comes first and, where n > POOL, who meets."""
    order: list[NDArray[np.int64]] = []
    sum_K = np.zeros(v_nK.shape[1])
    shuffled = random.permutation(len(v_nK))
    for first in range(0, len(shuffled), POOL):
        pool = shuffled[first : first + POOL]
        v_pK = v_nK[pool]
        left_p = np.square(v_pK).sum(1)  # |v|^2 of those that are left, inf of those that are not
        taken = np.empty(len(pool), np.int64)
        for place in range(len(pool)):
            nearest = 0 if not first and not place else int((left_p + 2 * v_pK @ sum_K).argmin())
            taken[place], left_p[nearest] = nearest, np.inf
            sum_K += v_pK[nearest]
        order.append(pool[taken])
    return np.concatenate(order)
