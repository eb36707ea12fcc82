"""Sparse bases beside dense ones: silent at zero drift, and close to the full vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast.divergence import Divergence
from holdfast.objective import Base, DenseBase, Head, token_losses
from problems import F64, FORWARD, sparse, tail_heavy


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_sparse_base_is_silent_at_zero_drift(kind: str) -> None:
    """Its log-probabilities come from float64, so what is left is the rounding of fp32."""
    hidden, _, weight, targets = tail_heavy(3.0, torch.Generator().manual_seed(5))
    logp = (hidden.detach().to(F64) @ weight.to(F64).T).log_softmax(-1)
    listed = [list({int(t), *row}) for t, row in zip(targets, logp.topk(20).indices.tolist())]  # noqa: B905
    every = torch.ones(24, dtype=torch.bool)
    divergence = Divergence(kind=kind)  # type: ignore[arg-type]
    _, kl = token_losses(
        hidden,
        Head(weight),
        targets,
        nll_N=every,
        kl_N=every,
        base=sparse(logp, listed),
        divergence=divergence,
    )
    kl.sum().backward()
    assert kl.abs().max() < 1e-6
    assert hidden.grad.norm(dim=1).max() < 2e-6


@pytest.mark.parametrize(("peak", "entries"), [(1.0, 499), (4.0, 60), (12.0, 20)])
def test_a_sparse_base_agrees_with_the_full_vocabulary(peak: float, entries: int) -> None:
    """Flat (nearly all listed), between, and peaked; a bucket's KL is a lower bound."""
    hidden, base, weight, targets = tail_heavy(peak, torch.Generator().manual_seed(6))
    logp = (base.to(F64) @ weight.to(F64).T).log_softmax(-1)
    listed = [
        list({int(target), *row})
        for target, row in zip(targets, logp.topk(entries).indices.tolist(), strict=True)
    ]
    every = torch.ones(24, dtype=torch.bool)
    values, gradients = [], []
    for side in (sparse(logp, listed), DenseBase(base, Head(weight))):
        _, kl = token_losses(
            hidden,
            Head(weight),
            targets,
            nll_N=every,
            kl_N=every,
            base=side,
            divergence=FORWARD,
        )
        values.append(kl.detach())
        gradients.append(torch.autograd.grad(kl.sum(), hidden)[0])
    assert (values[0] <= values[1] + 1e-6).all()
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 0.05


def test_a_sparse_base_without_a_tail_is_the_full_vocabulary() -> None:
    """log_tail is -inf: nothing is left on either side."""
    hidden, base, weight, targets = tail_heavy(2.0, torch.Generator().manual_seed(7))
    logp = (base.to(F64) @ weight.to(F64).T).log_softmax(-1)
    whole = sparse(logp, [list(range(500))] * 24)
    assert (whole.log_tail == -torch.inf).all()
    every = torch.ones(24, dtype=torch.bool)
    gradients = []
    for side in (whole, DenseBase(base, Head(weight))):
        for kind in ("forward", "reverse", "js"):
            _, kl = token_losses(
                hidden,
                Head(weight),
                targets,
                nll_N=~every,
                kl_N=every,
                base=side,
                divergence=Divergence(kind=kind),  # type: ignore[arg-type]
            )
            assert kl.isfinite().all()
            gradients.append(torch.autograd.grad(kl.sum(), hidden)[0])
    for one, other in zip(gradients[:3], gradients[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_compared_is_an_error() -> None:
    hidden, _, weight, targets = tail_heavy(1.0, torch.Generator().manual_seed(8))
    every = torch.ones(24, dtype=torch.bool)

    def call(base: Base | None) -> None:
        token_losses(
            hidden, Head(weight), targets, nll_N=every, kl_N=every, base=base, divergence=FORWARD
        )

    with pytest.raises(ValueError, match="base is None"):
        call(None)
    logp = torch.full((24, 500), 1 / 500, dtype=F64).log()
    with pytest.raises(ValueError, match="must list the target"):
        call(sparse(logp, [[(int(target) + 1) % 500] for target in targets]))


def test_a_tail_too_small_for_fp32_keeps_its_logarithm_and_its_gradient() -> None:
    """Student: token 0 by a margin of 200; base: 3 even tokens, of which token 0 is listed."""
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    head = Head(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    base = sparse(torch.full((1, 3), 1 / 3, dtype=F64).log(), [[0]])
    every = torch.ones(1, dtype=torch.bool)
    _, kl = token_losses(
        hidden,
        head,
        torch.zeros(1, dtype=torch.long),
        nll_N=~every,
        kl_N=every,
        base=base,
        divergence=FORWARD,
    )
    kl.sum().backward()
    # log q of the tail is log 2 - 200; by hand
    value = math.log(1 / 3) / 3 + 2 / 3 * (math.log(2 / 3) - math.log(2) + 200)
    assert kl.item() == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(hidden.grad, torch.tensor([[2 / 3, 0.0]]))
