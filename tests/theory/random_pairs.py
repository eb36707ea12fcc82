"""Two random quadratic losses for the tests of this folder."""

from __future__ import annotations

from typing import Any

import numpy as np

from holdfast.theory import TwoTasks


def spd(rng: np.random.Generator, n: int) -> Any:
    """A random symmetric positive definite matrix, eigenvalues of 0.1 or more."""
    root = rng.standard_normal((n, n))
    return root @ root.T / n + 0.1 * np.eye(n)


def drawn(seed: int, n: int, *, alike: bool = False) -> TwoTasks:
    """Two tasks with random optima, curvatures, Fisher estimate and basis."""
    rng = np.random.default_rng(seed)
    F_NN = spd(rng, n)
    F_sft_NN = F_NN if alike else spd(rng, n)
    fisher_N = rng.uniform(0, 2, n)
    start_N, end_N = rng.standard_normal(n), rng.standard_normal(n)
    return TwoTasks(start_N, end_N, F_NN, F_sft_NN, fisher_N, rng.standard_normal((n, n)))
