"""Per-token losses against float64 torch with the logits written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from holdfast import objective
from holdfast.objective import Head, token_kl, token_nll

F64 = torch.float64


@contextmanager
def rows_a_chunk(rows: int, vocabulary: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "CHUNK_BYTES", 4 * rows * vocabulary)
        yield


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Hidden states (N, H) and heads of both sides, targets, and weights of the values."""
    size = st.integers(1, 9)
    n, h, v = draw(size), draw(size), draw(st.integers(2, 12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.1, 1.0, 4.0]))
    bias, trained = draw(st.booleans()), draw(st.booleans())
    scale, cap = draw(st.sampled_from([1.0, 0.25, 3.0])), draw(st.sampled_from([None, 2.0, 30.0]))

    def normal(*shape: int) -> torch.Tensor:
        return spread * torch.randn(*shape, generator=random)

    def head(trained: bool) -> Head:
        weight, offset = normal(v, h), normal(v) if bias else None
        weight.requires_grad_(trained)
        if offset is not None:
            offset.requires_grad_(trained)
        return Head(weight, offset, scale, cap)

    return {
        "hidden": normal(n, h).requires_grad_(),
        "head": head(trained),
        "base_hidden": normal(n, h),
        "base_head": head(False),
        "targets": torch.randint(v, (n,), generator=random),
        "upstream": torch.rand(n, generator=random),
        "chunk": draw(st.integers(1, n + 2)),
    }


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


def check_against_float64(problem: dict[str, Any], ours: torch.Tensor, expected: Any) -> None:
    """Compare value and the gradient of sum(upstream * value) for every tensor that takes one."""
    hidden, head = problem["hidden"].detach().to(F64).requires_grad_(), doubled(problem["head"])
    theirs = expected(hidden, head)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.to(F64), theirs, rtol=1e-4, atol=2e-5)
    weights = problem["upstream"]
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    pairs = [(problem["hidden"], hidden)]
    if problem["head"].trained:
        pairs.append((problem["head"].weight_VH, head.weight_VH))
        pairs += [(problem["head"].bias_V, head.bias_V)] if head.bias_V is not None else []
    for single, double in pairs:
        scale = float(double.grad.abs().max())
        torch.testing.assert_close(
            single.grad.to(F64), double.grad, rtol=1e-3, atol=2e-5 * max(1.0, scale)
        )


@given(problems())
@settings(max_examples=120, deadline=None)
def test_nll_is_cross_entropy_in_float64(problem: dict[str, Any]) -> None:
    with rows_a_chunk(problem["chunk"], problem["head"].weight_VH.shape[0]):
        ours = token_nll(problem["hidden"], problem["head"], problem["targets"])
        check_against_float64(
            problem,
            ours,
            lambda hidden, head: torch.nn.functional.cross_entropy(
                logits(hidden, head), problem["targets"], reduction="none"
            ),
        )


@given(problems())
@settings(max_examples=120, deadline=None)
def test_kl_is_kl_div_in_float64_and_never_negative(problem: dict[str, Any]) -> None:
    base = logits(problem["base_hidden"].to(F64), doubled(problem["base_head"])).detach()
    with rows_a_chunk(problem["chunk"], problem["head"].weight_VH.shape[0]):
        ours = token_kl(
            problem["hidden"], problem["head"], problem["base_hidden"], problem["base_head"]
        )
        assert (ours >= -1e-6).all()
        check_against_float64(
            problem,
            ours,
            lambda hidden, head: torch.nn.functional.kl_div(
                logits(hidden, head).log_softmax(-1),
                base.log_softmax(-1),
                reduction="none",
                log_target=True,
            ).sum(-1),
        )


@given(problems())
@settings(max_examples=40, deadline=None)
def test_at_zero_drift_the_kl_and_its_gradient_are_exactly_zero(problem: dict[str, Any]) -> None:
    hidden, head = problem["hidden"], problem["head"]
    with rows_a_chunk(problem["chunk"], head.weight_VH.shape[0]):
        kl = token_kl(hidden, head, hidden.detach().clone(), head)
        kl.sum().backward()
    assert not kl.any()
    assert not hidden.grad.any()
    if head.trained:
        assert not head.weight_VH.grad.any()


@pytest.mark.parametrize("trained", [False, True])
def test_a_choice_of_no_token_stays_attached_to_the_graph(trained: bool) -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    head = Head(torch.randn(7, 4, requires_grad=trained))
    none = torch.zeros(5, dtype=torch.bool)
    for losses in (
        token_nll(hidden[none], head, torch.zeros(0, dtype=torch.long)),
        token_kl(hidden[none], head, hidden[none].detach(), head),
    ):
        assert losses.shape == (0,)
        losses.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_without_a_gradient_the_values_are_the_same() -> None:
    hidden, weight, base = torch.randn(9, 4), torch.randn(7, 4), torch.randn(9, 4)
    targets = torch.arange(9) % 7
    needs = hidden.clone().requires_grad_()
    for a, b in (
        (token_nll(hidden, Head(weight), targets), token_nll(needs, Head(weight), targets)),
        (
            token_kl(hidden, Head(weight), base, Head(weight)),
            token_kl(needs, Head(weight), base, Head(weight)),
        ),
    ):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16_stays_within_its_own_precision(trained: bool) -> None:
    """Against float64 on the same rounded numbers; bfloat16 has 8 bits, so about 1 % of a logit."""
    random = torch.Generator().manual_seed(3)
    hidden, base = (torch.randn(20, 16, generator=random).bfloat16() for _ in range(2))
    weight = (torch.randn(50, 16, generator=random) / 4).bfloat16().requires_grad_(trained)
    hidden.requires_grad_()
    targets = torch.randint(50, (20,), generator=random)
    losses = token_nll(hidden, Head(weight), targets) + token_kl(
        hidden, Head(weight), base, Head(weight.detach())
    )
    wide = hidden.detach().to(F64).requires_grad_()
    full = wide @ weight.detach().to(F64).T
    p = (base.to(F64) @ weight.detach().to(F64).T).log_softmax(-1)
    kl = torch.nn.functional.kl_div(full.log_softmax(-1), p, reduction="none", log_target=True)
    expected = torch.nn.functional.cross_entropy(full, targets, reduction="none") + kl.sum(-1)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.to(F64), expected, rtol=2e-2, atol=2e-2)
    losses.sum().backward()
    expected.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    error = (hidden.grad.to(F64) - wide.grad).norm() / wide.grad.norm()
    assert error < 1e-2


class Sizes(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("loss", ["nll", "kl"])
def test_more_tokens_do_not_make_the_largest_tensor_larger(loss: str, trained: bool) -> None:
    """Nothing of size N x V is made or kept: not in forward, not in backward."""
    vocabulary, width, rows = 512, 4, 8
    largest, kept = [], []
    for tokens in (16, 256):
        head = Head(torch.randn(vocabulary, width, requires_grad=trained))
        hidden = torch.randn(tokens, width, requires_grad=True)
        saved: list[int] = []

        def count(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with rows_a_chunk(rows, vocabulary), Sizes() as sizes:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                if loss == "nll":
                    losses = token_nll(hidden, head, torch.zeros(tokens, dtype=torch.long))
                else:
                    losses = token_kl(hidden, head, torch.randn(tokens, width), head)
            losses.sum().backward()
        largest.append(sizes.largest)
        kept.append(sum(saved))
    assert largest == [rows * vocabulary] * 2
    assert kept[1] < 256 * vocabulary / 4
