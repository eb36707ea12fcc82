"""Divergences and their gradients against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from holdfast.divergence import ABSENT, Divergence

F64 = torch.float64
DIVERGENCES = st.builds(
    Divergence,
    kind=st.sampled_from(["forward", "reverse", "js"]),
    js_coefficient=st.sampled_from([0.1, 0.5, 0.9]),
    mask_target=st.booleans(),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
)


def plain(
    divergence: Divergence, logp_B: torch.Tensor, logq_B: torch.Tensor, target: int
) -> torch.Tensor:
    """The divergence of one position, as its definition is written."""
    if divergence.mask_target:
        keep = [b for b in range(len(logp_B)) if b != target]
        logp_B, logq_B = logp_B[keep].log_softmax(0), logq_B[keep].log_softmax(0)
    p, q, beta = logp_B.exp(), logq_B.exp(), divergence.js_coefficient
    if divergence.kind == "forward":
        return (p * (logp_B - logq_B)).sum()
    if divergence.kind == "reverse":
        return (q * (logq_B - logp_B)).sum()
    logm = (beta * p + (1 - beta) * q).log()
    return beta * (p * (logp_B - logm)).sum() + (1 - beta) * (q * (logq_B - logm)).sum()


@given(DIVERGENCES, st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_value_and_gradient_are_those_of_the_definition(
    divergence: Divergence, rows: int, buckets: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    base, tuned = (3 * torch.randn(rows, buckets, dtype=F64, generator=random) for _ in range(2))
    target = torch.randint(buckets, (rows,), generator=random)
    tuned.requires_grad_()
    logp = (base / divergence.temperature).log_softmax(1)
    logq = (tuned / divergence.temperature).log_softmax(1)
    expected = torch.stack(
        [plain(divergence, logp[r], logq[r], int(target[r])) for r in range(rows)]
    )
    expected.sum().backward()
    value, grad = divergence.value_and_grad(logp, logq.detach().clone(), target)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, tuned.grad, rtol=1e-6, atol=1e-9)


@given(DIVERGENCES, st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_at_zero_drift_value_and_gradient_are_exactly_zero(
    divergence: Divergence, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    logp = (4 * torch.randn(5, 50, generator=random)).log_softmax(1)
    value, grad = divergence.value_and_grad(logp, logp.clone(), torch.zeros(5, dtype=torch.long))
    assert not value.any()
    assert not grad.any()


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_small_drift_has_a_small_value_to_many_digits(kind: str) -> None:
    """In fp32, against float64 on the same log-probabilities; both sides sum to 1 but for fp32."""
    random = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(8, 1000, dtype=F64, generator=random)
    moved = logits + 1e-2 * torch.randn(8, 1000, dtype=F64, generator=random)
    divergence = Divergence(kind=kind)  # type: ignore[arg-type]
    none = torch.zeros(8, dtype=torch.long)
    wide, wide_grad = divergence.value_and_grad(logits.log_softmax(1), moved.log_softmax(1), none)
    value, grad = divergence.value_and_grad(
        logits.log_softmax(1).float(), moved.log_softmax(1).float(), none
    )
    assert wide.max() < 1e-3
    torch.testing.assert_close(value.to(F64), wide, rtol=1e-2, atol=2e-7)
    assert (grad - wide_grad).norm() / wide_grad.norm() < 1e-3


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_buckets_that_neither_side_has_change_nothing(kind: str) -> None:
    divergence = Divergence(kind=kind)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(2)
    logp, logq = (torch.randn(3, 6, generator=random).log_softmax(1) for _ in range(2))
    none = torch.zeros(3, dtype=torch.long)
    absent = torch.full((3, 2), ABSENT)
    wider = divergence.value_and_grad(
        torch.cat([logp, absent], 1), torch.cat([logq, absent], 1), none
    )
    value, grad = divergence.value_and_grad(logp, logq, none)
    torch.testing.assert_close(wider[0], value)
    torch.testing.assert_close(wider[1], torch.cat([grad, torch.zeros(3, 2)], 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("js_coefficient", 0.0), ("js_coefficient", 1.0), ("kind", "l2")],
)
def test_what_is_no_divergence_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Divergence.model_validate({field: value})
