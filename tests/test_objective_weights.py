"""What a pass saves by knowing in forward what its losses will weigh; and that it risks nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.objective import Base, DenseBase, Head, token_losses
from problems import F64, FORWARD, sparse, tail_heavy, told

VOCABULARY = 500


class Products(TorchDispatchMode):
    """Counts matrix products of which the vocabulary is a side."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            sides = {size for arg in args if isinstance(arg, torch.Tensor) for size in arg.shape}
            self.count += VOCABULARY in sides
        return func(*args, **(kwargs or {}))


class Case:
    """24 positions, the first 15 with an NLL and the last 13 with a KL: 4 have both."""

    def __init__(self, base: str | None, trained: bool) -> None:
        random = torch.Generator().manual_seed(12)
        self.hidden, moved, weight, self.targets = tail_heavy(2.0, random)
        self.weight = weight.requires_grad_(trained)
        self.nll = torch.arange(24) < 15
        self.kl = torch.arange(24) > 10 if base else torch.zeros(24, dtype=torch.bool)
        self.up = torch.rand(15, generator=random), torch.rand(int(self.kl.sum()), generator=random)
        self.base: Base | None = None
        logp = (moved.to(F64) @ weight.detach().to(F64).T).log_softmax(-1)[self.kl]
        if base == "dense":
            self.base = DenseBase(moved[self.kl], Head(weight.detach()))
        elif base == "sparse":
            top = zip(self.targets[self.kl].tolist(), logp.topk(20).indices.tolist(), strict=True)
            self.base = sparse(logp, [list({target, *ids}) for target, ids in top])

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]

    def losses(self, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return token_losses(
            self.hidden,
            Head(self.weight),
            self.targets,
            nll_N=self.nll,
            kl_N=self.kl,
            base=self.base,
            divergence=FORWARD,
            **weights,
        )

    def loss(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Weighted by `up`."""
        pairs = zip(self.losses(weights), self.up, strict=True)
        return sum((value * up).sum() for value, up in pairs)  # type: ignore[return-value]

    def expected(self) -> tuple[torch.Tensor, ...]:
        """By float64 torch's own losses, dense; the base's logits from the start."""
        assert self.base is None or isinstance(self.base, DenseBase)
        hidden, weight = (x.detach().to(F64).requires_grad_() for x in (self.hidden, self.weight))
        logq = (hidden @ weight.T).log_softmax(1)
        nll = torch.nn.functional.nll_loss(logq, self.targets, reduction="none")[self.nll]
        loss = (nll * self.up[0]).sum()
        if self.base is not None:
            logp = (self.base.hidden_MH.to(F64) @ weight.detach().T).log_softmax(1)
            kl = torch.nn.functional.kl_div(logq[self.kl], logp, reduction="none", log_target=True)
            loss = loss + (kl.sum(1) * self.up[1]).sum()
        return torch.autograd.grad(loss, (hidden, weight)[: len(self.inputs)])


def close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to(F64), other.to(F64), rtol=1e-4, atol=2e-5)


# (base, head trained, products with weights: forward's and, if they were wrong, backward's)
COUNTS = [
    (None, False, 2),  # logits, back to the hidden states
    (None, True, 3),  # and to the weight
    ("sparse", False, 2),
    ("sparse", True, 3),
    ("dense", False, 3),  # the base's logits
    ("dense", True, 4),
]


@pytest.mark.parametrize(("base", "trained", "products"), COUNTS)
@pytest.mark.parametrize("factor", [1.0, 1 / 3, -(2.0**16)])
def test_backward_of_what_was_told_needs_no_product(
    base: str | None, trained: bool, products: int, factor: float
) -> None:
    """NLLs and KLs lie in two chunks, as positions with and without a KL are kept apart."""
    case = Case(base, trained)
    case.nll[:11] = base is None  # one chunk: counts are those of a chunk
    case.up = case.up[0][: int(case.nll.sum())], case.up[1]
    plainly = torch.autograd.grad(case.loss({}), case.inputs)
    with Products() as products_of:
        loss = case.loss(told(*case.up)) * factor
        assert products_of.count == products
        found = torch.autograd.grad(loss, case.inputs)
        assert products_of.count == products
    close([x / factor for x in found], plainly)
    if base != "sparse":
        close([x / factor for x in found], case.expected())


@pytest.mark.parametrize(("base", "trained", "products"), COUNTS)
def test_other_weights_than_those_told_cost_time_only(
    base: str | None, trained: bool, products: int
) -> None:
    """One loss of 15 weighs a little more; some are NaN; none were expected to count."""
    case = Case(base, trained)
    expected = torch.autograd.grad(case.loss({}), case.inputs)
    for at, weight in ((3, 1.001), (3, float("nan")), (slice(None), 0.0)):
        nll, kl = case.up[0].clone(), case.up[1].clone()
        nll[at] *= weight
        if weight == 0:
            kl *= 0
        loss = case.loss(told(nll, kl))
        with Products() as again:
            found = torch.autograd.grad(loss, case.inputs)
        assert again.count >= products, "formed anew"
        close(found, expected)


def test_an_upstream_of_nan_or_zero_arrives() -> None:
    case = Case("dense", True)
    for factor in (float("nan"), 0.0):
        loss = case.loss(told(*case.up)) * factor
        for found in torch.autograd.grad(loss, case.inputs):
            assert bool(found.isnan().any() if factor else (found == 0).all())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("base", [None, "sparse", "dense"])
def test_a_pass_may_be_used_more_than_once(base: str | None, trained: bool) -> None:
    """Two backward passes add up; so do two passes (micro-batches) in one; a part may be asked."""
    case, again = Case(base, trained), Case(base, trained)
    expected = torch.autograd.grad(case.loss({}), case.inputs)
    loss = case.loss(told(*case.up))
    for at in (slice(1), slice(-1, None), slice(None)):
        found = torch.autograd.grad(loss, case.inputs[at], retain_graph=True)
        close(found, expected[at])
    loss.backward(retain_graph=True)
    loss.backward()
    case.loss(told(*case.up)).backward()
    close([x.grad for x in case.inputs], [3 * x for x in expected])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    (again.loss(told(*again.up)) + again.loss(told(*again.up)) / 2).backward()
    close([x.grad for x in again.inputs], [1.5 * x for x in expected])


def test_a_loss_whose_weights_hang_on_its_values() -> None:
    """Dynamic fine-tuning (arXiv 2508.05629): each NLL weighs p(target). By torch in float64."""
    case = Case(None, True)
    nll, _ = case.losses(told(torch.ones(15), torch.ones(0)))
    found = torch.autograd.grad((nll.detach().neg().exp() * nll).sum(), case.inputs)
    wide = [x.detach().to(F64).requires_grad_() for x in case.inputs]
    logits, targets = (wide[0] @ wide[1].T)[case.nll], case.targets[case.nll]
    plainly = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    close(found, torch.autograd.grad((plainly.detach().neg().exp() * plainly).sum(), wide))


def test_without_a_gradient_none_is_formed() -> None:
    for frozen in (False, True):
        case = Case("dense", trained=True)
        case.hidden.requires_grad_(not frozen)
        case.weight.requires_grad_(not frozen)
        kept = []

        def keep(tensor: torch.Tensor, kept: list[Any] = kept) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        case.nll[:11] = False
        case.up = case.up[0][:4], case.up[1]
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with Products() as products, torch.set_grad_enabled(frozen), hooks:
            loss = case.loss(told(*case.up))
        assert products.count == 2
        assert not loss.requires_grad
        assert not kept


def test_one_weight_for_each_loss() -> None:
    case = Case("dense", trained=False)
    nll, kl = case.up
    for weights in (told(nll[1:], kl), {"nll_weight": nll}, {"kl_weight": kl}):
        with pytest.raises(ValueError, match="15 NLLs and 13 KLs"):
            case.loss(weights)
