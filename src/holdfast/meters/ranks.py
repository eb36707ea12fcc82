"""Ranks: in how many directions a matrix was changed, and how evenly.

    effective rank = exp(-sum_i p_i log p_i),  p_i = s_i / sum_j s_j    (Roy & Vetterli 2007)
    stable rank    = ||D||_F^2 / ||D||_2^2 = sum_i s_i^2 / s_1^2

with s the singular values of the change D. Both lie between 1 and the rank, so at most r under
LoRA; full fine-tuning's are 10 to 100 times higher. Of experts fused into one tensor, the mean.
Exact: nothing is sampled, so there is no standard error.
Cost: under LoRA next to nothing; else for each matrix a product and an eigenvalue decomposition of
its smaller side's size, in float64.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from holdfast.meters import Reading

if TYPE_CHECKING:
    from torch import Tensor

    from holdfast.meters.drift import Start


def read_ranks(start: Start, step: int) -> list[Reading]:
    """For each matrix that moved a reading of `effective_rank` and one of `stable_rank`."""
    started = time.perf_counter()
    spectra = {name: values for name, values in start.spectra().items() if values.any()}
    seconds = time.perf_counter() - started
    found = []
    for name, values_EK in spectra.items():
        moved_EK = values_EK[values_EK.any(1)]  # an expert without a token has no change
        for meter, rank_E in (
            ("effective_rank", effective_rank(moved_EK)),
            ("stable_rank", stable_rank(moved_EK)),
        ):
            found.append(
                Reading(
                    meter=meter,
                    name=name,
                    split="train",
                    step=step,
                    value=float(rank_E.mean()),
                    stderr=None,
                    n=len(moved_EK),
                    unit="rank",
                    seconds=seconds / (2 * len(spectra)),
                )
            )
    return found


def effective_rank(values_EK: Tensor) -> Tensor:
    """Of singular values (E, k), not all zero: (E,)."""
    import torch

    p_EK = values_EK / values_EK.sum(1, keepdim=True)
    rank_E: Tensor = torch.special.entr(p_EK).sum(1).exp()
    return rank_E


def stable_rank(values_EK: Tensor) -> Tensor:
    """Of singular values (E, k), not all zero: (E,)."""
    return values_EK.square().sum(1) / values_EK.amax(1).square()


def singular_values(stack: Tensor) -> Tensor:
    """Singular values (E, k) of matrices (E, m, n), largest first, in float64.

    Roots of the eigenvalues of the smaller Gram matrix, one matrix at a time: what is below about
    1e-8 of the largest is rounding.
    """
    import torch

    wide = stack if stack.shape[1] <= stack.shape[2] else stack.mT
    found = []
    for matrix in wide:
        matrix = matrix.double()
        squares = torch.linalg.eigvalsh(matrix @ matrix.mT)
        found.append(squares.clamp(min=0).sqrt().flip(0))
    return torch.stack(found)
