"""What the trained weights have moved by since the start, as quadratic penalties with a gradient.

A penalty on weights acts on what the model multiplies with, so on the product where an adapter is
trained, never on its factors (arXiv 2602.17559). For LoRA with scale s and factors B (out, r),
A (r, in) that began as B0, A0:

    D = s (B A - B0 A0) = s [B - B0, B0] [A; A - A0] = s U V
    ||D||_F^2 = s^2 <U'U, V V'>                              without D, 2 r squared numbers
    sum r_o c_i D_oi^2 = s^2 <U' diag(r) U, V diag(c) V'>    the same for a factored F = r c'

B0 is zero in most recipes; then U = B, V = A. A diagonal F needs D: one matrix at a time is formed
and at once turned into the gradients of B and A. Of E experts fused into one parameter each has a
pair of its own. Other peft methods are asked for D by `get_delta_weight`, and the answer is tried
out, for some return something else under that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from holdfast.errors import RequestError
from holdfast.fisher import Factored, Importance


class Moved(Protocol):
    """A trained matrix and where it began."""

    @property
    def weight(self) -> Tensor:
        """The model's weight that moves by D: an adapter's base, or what is trained itself."""

    def quadratic(self, importance: Importance | None = None) -> Tensor:
        """sum_i F_i D_i^2, differentiable in what is trained; F in the layout of `weight`.

        Without F the squared Frobenius norm.
        """


def moved(model: Any, asker: str) -> dict[str, Moved]:
    """Everything that is trained, by the name of the weight that moves; the start is now.

    Args:
        model: wrapped, and as training begins.
        asker: the recipe's key of the lever that asks, for what is refused.

    Raises:
        RequestError: an adapter changes a weight in a way that is no matrix added to it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Moved] = {}
    claimed: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        trained = {
            own: parameter
            for own, parameter in module.named_parameters()
            if parameter.requires_grad and not own.startswith("base_layer.")
        }
        if not trained:
            continue
        parameter = getattr(module, "parameter_name", None) or "weight"
        inside = name.replace(".base_layer", "")
        change = _product(module, trained, parameter) or _asked(module, trained)
        if change is None:
            raise RequestError(
                f"{asker}: {inside} carries a {type(module).__module__.split('.')[-2]} adapter "
                f"({', '.join(sorted(trained))}) whose change is not a matrix added to the weight; "
                f"set levers.adapter.method to lora (without variants) or none, or {asker} to none"
            )
        found[_short(f"{inside}.{parameter}")] = change
        claimed |= {id(p) for p in trained.values()}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in claimed:
            found[_short(name)] = Whole(p)
    return found


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


class Whole:
    """A tensor that is trained itself. Holds one copy of it, unless its start is given."""

    def __init__(self, parameter: Tensor, start: Tensor | None = None) -> None:
        self.weight = parameter
        self._start = parameter.detach().clone() if start is None else start.detach()

    def quadratic(self, importance: Importance | None = None) -> Tensor:
        """See `Moved`; nothing but the two tensors is held for backward."""
        value: Tensor = _Quadratic.apply(  # type: ignore[no-untyped-call]
            self.weight, self._start, importance
        )
        return value


class _Quadratic(torch.autograd.Function):
    """sum F (w - w0)^2, whose backward computes the difference again."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, start: Tensor, importance: Importance | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.start, ctx.importance = start, importance
        change = weight.float() - start.float()
        return (_weighed(change, importance) * change).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        change = weight.float() - ctx.start.float()
        weighed = _weighed(change, ctx.importance)
        return (2 * grad * weighed).to(weight.dtype), None, None


@dataclass(frozen=True)
class Product:
    """A LoRA pair on a matrix, or one for each of the experts fused into a 3-D parameter."""

    weight: Tensor
    a: Tensor
    """(E r, in)."""
    b: Tensor
    """(out, r E), as peft lays the experts out."""
    a_start: Tensor
    b_start: Tensor
    scale: float
    experts: int
    transposed: bool
    """Whether the weight is (in, out)."""

    def quadratic(self, importance: Importance | None = None) -> Tensor:
        """See `Moved`."""
        u, v = self._factors()
        if isinstance(importance, Tensor):
            diagonal = importance.mT if self.transposed else importance
            parts = (partial(self._diagonal, e, diagonal) for e in range(self.experts))
            return _at_once(parts, (self.b, self.a))
        if isinstance(importance, Factored):
            out, into = importance.rows, importance.columns
            out, into = (into, out) if self.transposed else (out, into)
            u = u * out.view(self.experts, -1, 1).sqrt()
            v = v * into.view(self.experts, 1, -1).sqrt()
        square: Tensor = ((u.mT @ u) * (v @ v.mT)).sum()
        return self.scale**2 * square

    def _diagonal(self, expert: int, importance: Tensor) -> Tensor:
        u, v = (factor[expert] for factor in self._factors())
        change = self.scale * (u @ v)
        return (importance.view(self.experts, *change.shape)[expert] * change.square()).sum()

    def _factors(self) -> tuple[Tensor, Tensor]:
        """U (E, out, r or 2 r) and V (E, r or 2 r, in)."""
        a, a_start = (self._by_expert_a(t) for t in (self.a, self.a_start))
        b, b_start = (self._by_expert_b(t) for t in (self.b, self.b_start))
        if not self._begins_elsewhere:
            return b, a
        return torch.cat([b - b_start, b_start], -1), torch.cat([a, a - a_start], -2)

    @property
    def _begins_elsewhere(self) -> bool:
        return bool(self.b_start.any())

    def _by_expert_a(self, a: Tensor) -> Tensor:
        return a.float().view(self.experts, -1, a.shape[1])

    def _by_expert_b(self, b: Tensor) -> Tensor:
        return b.float().view(b.shape[0], -1, self.experts).permute(2, 0, 1)


def _product(module: Any, trained: dict[str, nn.Parameter], parameter: str) -> Product | None:
    """The pair that a LoRA layer trains; None if it is something else, or more."""
    (adapter,) = module.active_adapters
    names = [f"lora_{factor}.{adapter}.weight" for factor in "AB"]
    if sorted(trained) != names or adapter in getattr(module, "lora_variant", {}):
        return None
    a, b = (trained[name] for name in names)
    weight = getattr(module.get_base_layer(), parameter)
    experts = getattr(module, "num_experts", 1)
    if a.ndim != 2 or (experts == 1 and weight.ndim == 3):
        return None
    swapped = weight.ndim == 3 and not module._did_swap_in_out_features
    return Product(
        weight,
        a,
        b,
        a.detach().clone(),
        b.detach().clone(),
        float(module.scaling[adapter]),
        experts,
        transposed=swapped or bool(getattr(module, "fan_in_fan_out", False)),
    )


class Asked:
    """What peft's own `get_delta_weight` says; the matrix is formed at each call."""

    def __init__(self, module: Any, adapter: str, trained: Sequence[Tensor]) -> None:
        self.weight: Tensor = module.get_base_layer().weight
        self._delta: Callable[[], Tensor] = partial(module.get_delta_weight, adapter)
        self._trained = tuple(trained)
        with torch.no_grad():
            self._start = self._delta().float()
        if not self._start.any():
            self._start = self._start.new_zeros(())

    def quadratic(self, importance: Importance | None = None) -> Tensor:
        """See `Moved`."""
        return _at_once([partial(self._part, importance)], self._trained)

    def _part(self, importance: Importance | None) -> Tensor:
        change = self._delta().float() - self._start
        value: Tensor = (_weighed(change, importance) * change).sum()
        return value


def _asked(module: Any, trained: dict[str, nn.Parameter]) -> Asked | None:
    """The layer's own word for its change, if that is what its output changes by."""
    (adapter,) = module.active_adapters
    base = module.get_base_layer()
    variant = adapter in getattr(module, "lora_variant", {})
    if variant or not hasattr(module, "get_delta_weight") or hasattr(module, "parameter_name"):
        return None
    parameters = list(trained.values())
    with _shaken(parameters), torch.no_grad():
        if not _adds_what_it_says(module, base, adapter):
            return None
    return Asked(module, adapter, parameters)


def _adds_what_it_says(module: Any, base: nn.Module, adapter: str) -> bool:
    """Whether module(x) - base(x) = x D^T for some x, the adapter being away from its start."""
    from transformers.pytorch_utils import Conv1D

    weight: Any = base.weight
    delta = module.get_delta_weight(adapter)
    if not isinstance(delta, Tensor) or delta.shape != weight.shape or delta.ndim != 2:
        return False
    random = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        put = torch.arange(min(8, weight.shape[0]), device=weight.device)
        expected = delta[put]
    else:
        matrix = delta if isinstance(base, Conv1D) else delta.T
        put = torch.randn(8, matrix.shape[0], generator=random).to(weight)
        expected = put @ matrix.to(put.dtype)
    was_training = module.training
    module.eval()
    change = module(put) - base(put)
    module.train(was_training)
    tolerance = 10 * torch.finfo(weight.dtype).eps ** 0.5
    size = float(expected.float().norm())
    return size > 0 and float((change - expected).float().norm()) <= tolerance * size


class _shaken:  # noqa: N801
    """Within, the parameters are moved by noise of their own size."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._was = [parameter.detach().clone() for parameter in parameters]

    def __enter__(self) -> None:
        random = torch.Generator().manual_seed(0)
        for parameter in self._parameters:
            noise = torch.randn(parameter.shape, generator=random).to(parameter)
            parameter.data.add_(noise * (0.1 + parameter.detach().abs().mean()))

    def __exit__(self, *_error: object) -> None:
        for parameter, was in zip(self._parameters, self._was, strict=True):
            parameter.data.copy_(was)


def _weighed(change: Tensor, importance: Importance | None) -> Tensor:
    if importance is None:
        return change
    if isinstance(importance, Factored):
        return change * importance.rows.unsqueeze(-1) * importance.columns.unsqueeze(-2)
    return change * importance


def _at_once(parts: Iterable[Callable[[], Tensor]], trained: Sequence[Tensor]) -> Tensor:
    """Sum of the parts with its gradients found at once, so that no part outlives its turn."""
    values: list[Tensor] = []
    grads = [torch.zeros_like(parameter) for parameter in trained]
    wanted = torch.is_grad_enabled()
    for part in parts:
        with torch.set_grad_enabled(wanted):
            value = part()
        if wanted:
            for total, grad in zip(grads, _gradients(value, trained), strict=True):
                total += grad
        values.append(value.detach())
    known: Tensor = _Known.apply(  # type: ignore[no-untyped-call]
        torch.stack(values).sum(), grads, *trained
    )
    return known


def _gradients(value: Tensor, trained: Sequence[Tensor]) -> Iterator[Tensor | float]:
    for grad in torch.autograd.grad(value, trained, allow_unused=True):
        yield 0.0 if grad is None else grad


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *trained: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *(grad.to(known.dtype) * known for known in ctx.grads)
