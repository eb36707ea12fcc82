"""Problems for the objective, and their solution by float64 torch with the logits written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st

from holdfast import chunks
from holdfast.divergence import Divergence
from holdfast.objective import Base, DenseBase, Head, SparseBase
from test_divergence import DIVERGENCES, plain

F64 = torch.float64
FORWARD = Divergence()


@contextmanager
def rows_a_chunk(rows: int, vocabulary: int) -> Iterator[None]:
    """Chunks of so many rows, worked on two rows at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CPU_CHUNK_BYTES", 4 * rows * vocabulary)
        patch.setattr(chunks, "CPU_BLOCK_BYTES", 4 * 2 * vocabulary)
        yield


@dataclass
class Problem:
    """Hidden states and heads of both sides, targets, masks, and weights of the values."""

    hidden: torch.Tensor
    head: Head
    base_hidden: torch.Tensor  # (N, H)
    base_head: Head
    targets: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    upstream: torch.Tensor  # (2, N)
    listed: list[list[int]] | None  # ids of each KL position; None: dense
    divergence: Divergence
    chunk: int
    told: str  # of the weights in forward: nothing, right or wrong

    def weights(self, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the pass is told of an upstream (2, N) of the losses."""
        if self.told == "nothing":
            return {}
        nll, kl = upstream[0][: self.nll.sum()] * 0.3, upstream[1][: self.kl.sum()] * 0.3
        return told(nll, kl) if self.told == "right" else told(nll + 1, kl)

    def base(self) -> Base:
        if self.listed is None:
            return DenseBase(self.base_hidden[self.kl], self.base_head)
        logp = (
            (logits(self.base_hidden, self.base_head)[self.kl] / self.divergence.temperature)
            .to(F64)
            .log_softmax(-1)
        )
        return sparse(logp, self.listed)


def told(nll: torch.Tensor, kl: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"nll_weight": nll, "kl_weight": kl}


def sparse(logp: torch.Tensor, listed: list[list[int]]) -> SparseBase:
    """What a cache would keep of these float64 log-probabilities."""
    tails = []
    for row, ids in enumerate(listed):
        rest = logp[row].clone()
        rest[ids] = -torch.inf
        tails.append(rest.logsumexp(0))
    return SparseBase(
        torch.tensor([0, *(len(ids) for ids in listed)]).cumsum(0),
        torch.tensor([i for ids in listed for i in ids], dtype=torch.long),
        torch.cat(
            [logp[row][ids] for row, ids in enumerate(listed)] or [logp.new_zeros(0)]
        ).float(),
        torch.stack(tails).float() if tails else torch.zeros(0),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    size = st.integers(1, 9)
    n, h, v = draw(size), draw(size), draw(st.integers(3, 12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.1, 1.0, 3.0]))
    bias, trained = draw(st.booleans()), draw(st.booleans())
    scale, cap = draw(st.sampled_from([1.0, 0.25, 2.0])), draw(st.sampled_from([None, 3.0, 30.0]))
    dense = draw(st.booleans())
    base_v = draw(st.integers(3, 12)) if dense else v

    def normal(*shape: int) -> torch.Tensor:
        return spread * torch.randn(*shape, generator=random)

    def head(tokens: int, trained: bool) -> Head:
        weight, offset = normal(tokens, h), normal(tokens) if bias else None
        weight.requires_grad_(trained)
        if offset is not None:
            offset.requires_grad_(trained)
        return Head(weight, offset, scale, cap)

    def mask() -> torch.Tensor:
        share = draw(st.sampled_from([0.0, 0.5, 1.0]))
        return torch.rand(n, generator=random) < share

    targets = torch.randint(min(v, base_v), (n,), generator=random)
    kl = mask()
    listed = None
    if not dense:
        extra = st.lists(st.integers(0, v - 1), max_size=v)
        listed = [list({int(target), *draw(extra)}) for target in targets[kl]]
    return Problem(
        normal(n, h).requires_grad_(),
        head(v, trained),
        normal(n, h),
        head(base_v, False),
        targets,
        mask(),
        kl,
        torch.rand(2, n, generator=random),
        listed,
        draw(DIVERGENCES),
        draw(st.integers(1, n + 2)),
        draw(st.sampled_from(["nothing", "right", "wrong"])),
    )


def doubled(head: Head) -> Head:
    def double(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().to(F64).requires_grad_()

    return replace(head, weight_VH=double(head.weight_VH), bias_V=double(head.bias_V))


def logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Cohere's and Granite's multiplier, then Gemma 2's soft cap, as transformers writes them."""
    full = hidden @ head.weight_VH.T
    if head.bias_V is not None:
        full = full + head.bias_V
    full = full * head.scale
    return full if head.cap is None else head.cap * torch.tanh(full / head.cap)


def expected(
    problem: Problem, hidden: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL and divergence with all logits, position by position; in the dtype of what is given."""
    tuned = logits(hidden, head)
    nll = torch.nn.functional.cross_entropy(
        tuned[problem.nll], problem.targets[problem.nll], reduction="none"
    )
    base = logits(problem.base_hidden.to(hidden.dtype), doubled(problem.base_head)).detach()
    tokens, temperature = min(tuned.shape[1], base.shape[1]), problem.divergence.temperature
    kl = []
    for at, n in enumerate(problem.kl.nonzero().flatten().tolist()):
        sides = [(side[n, :tokens] / temperature).log_softmax(0) for side in (base, tuned)]
        target = int(problem.targets[n])
        if problem.listed is not None:
            ids = problem.listed[at]
            rest = [token for token in range(tokens) if token not in ids]
            tail = [rest] if rest else []
            sides = [
                torch.cat([side[ids], *(side[r].logsumexp(0, keepdim=True) for r in tail)])
                for side in sides
            ]
            target = ids.index(target)
        if problem.divergence.mask_target and len(sides[0]) == 1:
            kl.append(0 * sides[1].sum())  # nothing but the target is left to compare
        else:
            kl.append(plain(problem.divergence, sides[0], sides[1], target))
    return nll, torch.stack(kl) if kl else 0 * hidden[:0, 0]


def tail_heavy(peak: float, random: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Hidden states, their base's, a head and targets; `peak` sharpens the distributions."""
    hidden = torch.randn(24, 32, generator=random)
    weight = peak * torch.randn(500, 32, generator=random) / 32**0.5
    base = hidden + 0.1 * torch.randn(24, 32, generator=random)
    return hidden.requires_grad_(), base, weight, torch.randint(500, (24,), generator=random)
