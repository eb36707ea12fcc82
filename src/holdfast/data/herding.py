"""An order of rows in which any few of them, one after the other, are like all of them together.

Source: herding, Welling 2009 (ICML); as an order of training rows, Lu et al. 2022 (arXiv
2205.10733), who balance gradients where this balances words, which cost no pass of a model.
Equation: next comes argmin_i |v_1 + ... + v_(t-1) + v_i|^2 over the `WAITING` rows that have waited
longest in a random order; v_i is the direction in which row i differs from the mean row, of length
one, less the mean of these. Of all rows the best would be left to the last the odd ones and the
long ones, which a run that ends within an epoch would never read. A row is the square roots of its
tokens' shares (so that distances are Hellinger's), on the `DIRECTIONS` in which rows differ most.

Shape suffixes: n rows, V tokens of the vocabulary that occur, K directions, w rows that wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DIRECTIONS = 16
WAITING = 64
"""Of 16 that wait, twice the variance of a step's mix is left; of all, a row's place goes with its
length (docs/log.md)."""


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
    _, _, main_KV = svds(roots_nV, k=K, v0=np.ones(min(roots_nV.shape)))
    apart_nK = roots_nV @ main_KV.T
    apart_nK -= apart_nK.mean(0)
    length_n = np.linalg.norm(apart_nK, axis=1, keepdims=True)
    v_nK = apart_nK / np.maximum(length_n, 1e-9)
    return np.asarray(v_nK - v_nK.mean(0))


def herded(v_nK: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of the rows; `random` says in which order they wait, the first one goes first."""
    line = random.permutation(len(v_nK))
    waiting_w, line = line[:WAITING], line[WAITING:]
    order, sum_K = np.empty(len(v_nK), np.int64), np.zeros(v_nK.shape[1])
    for place in range(len(order)):
        v_wK = v_nK[waiting_w]
        best = int((np.square(v_wK).sum(1) + 2 * v_wK @ sum_K).argmin()) if place else 0
        order[place] = waiting_w[best]
        sum_K += v_wK[best]
        waiting_w = np.concatenate([np.delete(waiting_w, best), line[place : place + 1]])
    return order
