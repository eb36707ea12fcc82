"""What the objective makes of tokens that were drawn from the tail of a cached distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from holdfast.divergence import Divergence
from holdfast.objective import Head, SparseBase, token_losses

V, H, M, WEIGHT = 40, 8, 6, 3.0
EVERY = torch.ones(M, dtype=torch.bool)


def drawn_base(logp_MV: Tensor, targets_M: Tensor, start: int = 0) -> SparseBase:
    """Lists the 5 likeliest tokens and the target; of the others every third is drawn."""
    parts, weights, tails = [], [], []
    for logp_V, target in zip(logp_MV, targets_M.tolist(), strict=True):
        listed = sorted({target, *logp_V.topk(5).indices.tolist()})
        rest = [v for v in range(V) if v not in listed]
        drawn = rest[start :: int(WEIGHT)]
        parts.append(listed + drawn)
        weights += [0.0] * len(listed) + [WEIGHT] * len(drawn)
        tails.append(logp_V[rest].logsumexp(0))
    offsets = torch.tensor([0, *map(len, parts)]).cumsum(0)
    ids = torch.tensor([v for part in parts for v in part])
    row = torch.arange(M).repeat_interleave(offsets.diff())
    return SparseBase(offsets, ids, logp_MV[row, ids], torch.stack(tails), torch.tensor(weights))


def plainly(
    logp_MV: Tensor, logq_MV: Tensor, base: SparseBase, targets_M: Tensor, mask: bool
) -> Tensor:
    """KL over listed tokens and tail, and the tail's own KL estimated: written out by position."""
    assert base.weights is not None
    values = []
    for m in range(M):
        part = slice(base.offsets[m], base.offsets[m + 1])
        ids, weights = base.ids[part], base.weights[part]
        listed, drawn = ids[weights == 0], ids[weights > 0]
        rest = [v for v in range(V) if v not in listed.tolist()]
        p, q = (
            torch.cat([log[m][listed], log[m][rest].logsumexp(0)[None]])
            for log in (logp_MV, logq_MV)
        )
        if mask:
            kept = torch.cat([listed != targets_M[m], torch.tensor([True])])
            p, q = p[kept].log_softmax(0), q[kept].log_softmax(0)
        inside_p, inside_q = (
            log[m][drawn] - log[m][rest].logsumexp(0) for log in (logp_MV, logq_MV)
        )
        each = inside_p.exp() * (inside_p - inside_q) - inside_p.exp() + inside_q.exp()
        tail = p[-1].exp() * (weights[weights > 0] * each).sum()
        values.append((p.exp() * (p - q)).sum() + tail)
    return torch.stack(values)


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the tuned head's weight, the base's, and targets; in float64."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=random, dtype=torch.float64)
    moved = weight + 0.2 * torch.randn(V, H, generator=random, dtype=torch.float64)
    hidden = torch.randn(M, H, generator=random, dtype=torch.float64)
    return hidden, weight, moved, torch.randint(V, (M,), generator=random)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mask", [False, True])
def test_value_and_gradient_are_those_of_the_equation(
    case: tuple[Tensor, ...], mask: bool, temperature: float, trained: bool
) -> None:
    """Expected: autograd through the equation in float64."""
    hidden, weight, moved, targets = case
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_(trained)
    logp = (hidden.detach() @ moved.T / temperature).log_softmax(-1)
    base = drawn_base(logp, targets)
    settings = Divergence(mask_target=mask, temperature=temperature)
    asked = {"nll_N": EVERY, "kl_N": EVERY, "base": base, "divergence": settings}
    kl = token_losses(hidden, Head(weight), targets, **asked)[1]
    logq = (hidden @ weight.T / temperature).log_softmax(-1)
    expected = plainly(logp, logq, base, targets, mask)
    torch.testing.assert_close(kl, expected, rtol=1e-6, atol=1e-9)
    upstream = torch.linspace(0.1, 1, M, dtype=torch.float64)
    inputs = [hidden, weight] if trained else [hidden]
    for ours, theirs in zip(
        torch.autograd.grad((kl * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def gradient(hidden: Tensor, weight: Tensor, targets: Tensor, base: SparseBase) -> Tensor:
    hidden = hidden.detach().requires_grad_()
    asked = {"nll_N": ~EVERY, "kl_N": EVERY, "base": base, "divergence": Divergence()}
    kl = token_losses(hidden, Head(weight), targets, **asked)[1]
    (found,) = torch.autograd.grad(kl.sum(), hidden)
    return found


def test_the_mean_over_all_draws_is_the_gradient_of_the_full_kl(case: tuple[Tensor, ...]) -> None:
    """Expected: (q - p) W. The three ways of drawing every third token draw each token once."""
    hidden, weight, moved, targets = case
    logp = (hidden @ moved.T).log_softmax(-1)
    full = ((hidden @ weight.T).softmax(-1) - logp.exp()) @ weight
    bases = [drawn_base(logp, targets, start) for start in range(3)]
    mean = torch.stack([gradient(hidden, weight, targets, base) for base in bases]).mean(0)
    torch.testing.assert_close(mean, full, rtol=1e-5, atol=1e-8)
    bucket = gradient(hidden, weight, targets, replace(bases[0], weights=None))
    assert (bucket - full).norm() > 1e-3 * full.norm()


def test_there_is_no_noise_at_zero_drift(case: tuple[Tensor, ...]) -> None:
    hidden, weight, _, targets = case
    base = drawn_base((hidden @ weight.T).log_softmax(-1), targets)
    assert gradient(hidden, weight, targets, base).abs().max() < 1e-12
