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

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIRECTIONS = 16
SAMPLE = 4096
"""Rows that say which directions those are; and rows that are looked at at once."""
WAITING = 64
"""Of 16 that wait, twice the variance of a step's mix is left; of all, a row's place goes with its
length (docs/log.md)."""


def directions(count: int, tokens: Callable[[int], Sequence[int]]) -> NDArray[np.float64]:
    """The rows' v, (n, K); they sum to zero. K is 0 where the rows have nothing to differ in.

    Args:
        count: of the rows, n.
        tokens: a row's number to its token ids, at least one.
    """
    from scipy.sparse.linalg import svds

    def read(some: NDArray[np.int64]) -> list[NDArray[Any]]:
        return [np.asarray(tokens(int(row))) for row in some]

    shuffled = np.random.default_rng(0).permutation(count)
    sample = read(shuffled[:SAMPLE])
    vocabulary_V = np.unique(np.concatenate(sample))
    roots_sV = _roots(sample, vocabulary_V)
    K = min(DIRECTIONS, *(size - 1 for size in roots_sV.shape))
    if K < 1:
        return np.zeros((count, 0))
    _, _, main_KV = svds(roots_sV, k=K, v0=np.ones(min(roots_sV.shape)))
    apart_nK = np.empty((count, K))
    apart_nK[shuffled[:SAMPLE]] = roots_sV @ main_KV.T
    for first in range(SAMPLE, count, SAMPLE):
        part = shuffled[first : first + SAMPLE]
        apart_nK[part] = _roots(read(part), vocabulary_V) @ main_KV.T
    apart_nK -= apart_nK.mean(0)
    v_nK = apart_nK / np.maximum(np.linalg.norm(apart_nK, axis=1, keepdims=True), 1e-9)
    return np.asarray(v_nK - v_nK.mean(0))


def _roots(rows: Sequence[NDArray[Any]], vocabulary_V: NDArray[Any]) -> Any:
    """Square roots of each token's share of each row, sparse (n, V)."""
    from scipy.sparse import csr_array

    lengths = np.array([len(row) for row in rows])
    tokens, row_of = np.concatenate(rows), np.repeat(np.arange(len(rows)), lengths)
    column = np.minimum(np.searchsorted(vocabulary_V, tokens), len(vocabulary_V) - 1)
    known = vocabulary_V[column] == tokens
    share = (1 / lengths)[row_of]
    found = (share[known], (row_of[known], column[known]))
    shares_nV = csr_array(found, shape=(len(rows), len(vocabulary_V)))
    shares_nV.sum_duplicates()
    return shares_nV.sqrt()


def herded(v_nK: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of the rows; `random` says in which order they wait, and which goes first."""
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
