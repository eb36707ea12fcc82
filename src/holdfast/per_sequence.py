"""Squared gradients of each row of a batch, from one backward pass over all of them.

Shape suffixes as in `fisher.py`. A `Collector` hooks the modules that own the weights asked for.
Each call of such a module becomes a use of its weights once the gradient at its output is known;
when a weight's last use is in, the uses are added up row by row and squared into its `Total`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from holdfast.errors import RequestError

CHUNK_BYTES = 2 * 2**20
"""Upper size of the rows' gradients alive at once (one row at least): what a cache holds."""


class Use(Protocol):
    """One use of a weight: what it adds to the gradient of each row."""

    def add_to(self, grads: Tensor, rows: slice) -> None:
        """Add the gradients of these rows to `grads` (C, *shape of the weight)."""


@dataclass(frozen=True)
class Outer:
    """A matrix product: left_b^T right_b."""

    left_BTO: Tensor
    right_BTI: Tensor

    def add_to(self, grads: Tensor, rows: slice) -> None:
        """See `Use`."""
        grads.baddbmm_(self.left_BTO[rows].mT, self.right_BTI[rows])


@dataclass(frozen=True)
class Lookup:
    """An embedding: the gradient of a token's vector is the sum over where it stands."""

    ids_BT: Tensor
    grad_BTH: Tensor

    def add_to(self, grads: Tensor, rows: slice) -> None:
        """See `Use`."""
        C, V, H = grads.shape
        first_C1 = torch.arange(C, device=grads.device).unsqueeze(1) * V
        flat = (self.ids_BT[rows] + first_C1).flatten()
        grads.view(C * V, H).index_add_(0, flat, self.grad_BTH[rows].flatten(0, 1))


@dataclass(frozen=True)
class Flat:
    """Gradients (B, *shape) that are small enough to be held: biases, norms."""

    grad_B: Tensor

    def add_to(self, grads: Tensor, rows: slice) -> None:
        """See `Use`."""
        grads += self.grad_B[rows]


@dataclass(frozen=True)
class Rerun:
    """Any other module: itself run again, one row at a time."""

    module: nn.Module
    name: str
    values: Mapping[str, Tensor]  # all of the module's own weights
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Mapping[int, Tensor]  # gradients by place in its output
    batch: tuple[int, int]

    def add_to(self, grads: Tensor, rows: slice) -> None:
        """See `Use`."""
        for c, b in enumerate(range(*rows.indices(self.batch[0]))):
            leaf = self.values[self.name].detach().requires_grad_()
            values = {**self.values, self.name: leaf}
            args = [self._row(value, b) for value in self.args]
            kwargs = {key: self._row(value, b) for key, value in self.kwargs.items()}
            with torch.enable_grad():
                out = torch.func.functional_call(self.module, values, (*args,), kwargs)
            found = (out,) if isinstance(out, Tensor) else out
            ends = [(found[i], self._row(grad, b)) for i, grad in self.out.items()]
            ends = [(end, grad.to(end.dtype)) for end, grad in ends if end.requires_grad]
            if ends:
                parts = torch.autograd.grad(
                    [end for end, _ in ends], leaf, [grad for _, grad in ends], allow_unused=True
                )
                grads[c] += 0 if parts[0] is None else parts[0]

    def _row(self, value: Any, b: int) -> Any:
        B, T = self.batch
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if value.shape[0] == B:
            return value[b : b + 1].detach()
        if value.shape[0] == B * T:
            return value[b * T : (b + 1) * T].detach()
        raise _mixed(self.module, value)


class Total:
    """Sum over rows of squared gradients of one weight; its row and column sums where factored."""

    def __init__(self, weight: Tensor, factored: bool) -> None:
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        if not weight.is_floating_point():  # packed by quantisation: its shape is not the matrix's
            raise RequestError(
                "levers.ewc: the base's weights are quantised; load it in float32 or bfloat16 "
                "(model.dtype), or leave levers.ewc out"
            )
        self.shape = weight.shape
        self.factored = factored and weight.ndim > 1
        sizes = [weight.shape]
        if self.factored:
            sizes = [weight.shape[:-1], weight.shape[:-2] + weight.shape[-1:]]
        self.sums = [torch.zeros(s, dtype=self.dtype, device=weight.device) for s in sizes]

    def add(self, uses: list[Use], rows: int) -> None:
        """Add the rows of one batch, whose gradients are the sums of these uses."""
        only = uses[0] if len(uses) == 1 else None
        if isinstance(only, Lookup):
            self._add_lookup(only)
        elif isinstance(only, Outer) and self.factored and self._short(only):
            self._add_by_grams(only)
        else:
            # a product first: it overwrites what the others add to
            uses = sorted(uses, key=lambda use: not isinstance(use, Outer))
            chunk = max(1, CHUNK_BYTES // (self.shape.numel() * self.dtype.itemsize))
            size = (min(chunk, rows), *self.shape)
            room = torch.empty(size, dtype=self.dtype, device=self.sums[0].device)
            for start in range(0, rows, chunk):
                part = slice(start, min(start + chunk, rows))
                grads = room[: part.stop - part.start]
                _fill(grads, uses, part)
                self._add_squares(grads)

    def _add_squares(self, grads: Tensor) -> None:
        squares = grads.square_()
        if self.factored:
            self.sums[0] += squares.sum(-1).sum(0)
            self.sums[1] += squares.sum(-2).sum(0)
        else:  # a product with ones: the sum over a few rows, without a pass to hold it
            ones = squares.new_ones(len(squares))
            self.sums[0].view(-1).addmv_(squares.flatten(1).T, ones)

    def _short(self, use: Outer) -> bool:
        """Whether the (T, T) Gram matrices cost less than the (O, I) gradient."""
        O, I = self.shape[-2:]  # noqa: E741
        return 2 * use.left_BTO.shape[1] * (O + I) < O * I

    def _add_by_grams(self, use: Outer) -> None:
        left, right = use.left_BTO, use.right_BTI
        self.sums[0] += ((right @ right.mT) @ left).mul_(left).sum((0, 1))
        self.sums[1] += ((left @ left.mT) @ right).mul_(right).sum((0, 1))

    def _add_lookup(self, use: Lookup) -> None:
        """Only tokens that occur have a gradient."""
        rows, V = len(use.ids_BT), self.shape[0]
        first_B1 = torch.arange(rows, device=use.ids_BT.device).unsqueeze(1) * V
        seen_U, place = torch.unique(use.ids_BT + first_B1, return_inverse=True)
        size = (len(seen_U), *self.shape[1:])
        grad_UH = torch.zeros(size, dtype=self.dtype, device=use.grad_BTH.device)
        grad_UH.index_add_(0, place.flatten(), use.grad_BTH.flatten(0, 1))
        square_UH = grad_UH.square_()
        if self.factored:
            self.sums[0].index_add_(0, seen_U % V, square_UH.sum(1))
            self.sums[1] += square_UH.sum(0)
        else:
            self.sums[0].index_add_(0, seen_U % V, square_UH)


def _fill(grads: Tensor, uses: list[Use], rows: slice) -> None:
    """Write the sum of the uses, for these rows, into `grads`."""
    first, *more = uses
    if isinstance(first, Outer):
        torch.bmm(first.left_BTO[rows].mT, first.right_BTI[rows], out=grads)
    else:
        first.add_to(grads.zero_(), rows)
    for use in more:
        use.add_to(grads, rows)


@dataclass
class _Call:
    """One call of a module that owns weights asked for."""

    module: nn.Module
    values: dict[str, Tensor]  # all of its own weights as they were in this call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    single: bool  # one tensor comes out
    grads: dict[int, Tensor] = field(default_factory=dict)  # by place in the output


class Collector:
    """Hooks on all modules of `model` that own one of the weights, and on its first embedding."""

    def __init__(self, model: Any, totals: Mapping[int, Total]) -> None:
        self._totals = totals
        self._owned: dict[nn.Module, dict[str, int]] = {}
        self._names: dict[nn.Module, list[str]] = {}
        head = model.get_output_embeddings()
        self._found: set[int] = {id(p) for p in head.parameters()}
        skipped = set(head.modules())  # its use is `add`ed: only one position goes through it here
        for module in model.modules():
            if module in skipped:
                continue
            owned = {
                name: id(parameter)
                for name, parameter in module.named_parameters(recurse=False)
                if id(parameter) in totals
            }
            if owned:
                self._owned[module] = owned
                self._names[module] = [name for name, _ in module.named_parameters(recurse=False)]
                self._found |= set(owned.values())
        if totals.keys() - self._found:
            raise ValueError("a weight is not a parameter of the model")
        self._model = model
        self._handles: list[Any] = []
        self._forward_runs = False

    def __enter__(self) -> Self:
        for module in {*self._owned, self._model.get_input_embeddings()}:
            hook = module.register_forward_hook(self._forward, with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def batch_of(self, B: int, T: int) -> Iterator[None]:
        """A batch of B rows of T positions goes forward within."""
        self.batch = (B, T)
        self._expected: Counter[int] = Counter()
        self._uses: defaultdict[int, list[Use]] = defaultdict(list)
        self._late: list[_Call] = []
        self._forward_runs = True
        yield
        self._forward_runs = False  # in backward modules are run again

    def wants(self, weight: Tensor | None) -> bool:
        """Whether this weight was asked for."""
        return id(weight) in self._totals

    def add(self, weight: Tensor, use: Use, *, expected: bool = False) -> None:
        """One more use of a weight; `expected`: one that no hook has announced."""
        self._add(id(weight), use, 0 if expected else 1)

    def end(self) -> None:
        """Square what backward has left: weights whose uses were announced but had no gradient."""
        for call in self._late:
            self._called(call)
        for weight in list(self._uses):
            self._totals[weight].add(self._uses.pop(weight), self.batch[0])

    def _add(self, weight: int, use: Use, announced: int) -> None:
        self._uses[weight].append(use)
        self._expected[weight] -= announced
        if not self._expected[weight]:
            self._totals[weight].add(self._uses.pop(weight), self.batch[0])

    def _forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._forward_runs:
            return output
        if isinstance(output, Tensor):
            # without trained weights nothing asks for gradients before the first of these
            output = output if output.requires_grad else _wanting(output)
        owned = self._owned.get(module, {})
        if not owned:
            return output
        # an adapter on fused experts stands in their place, for the time of this call alone
        values = {name: getattr(module, name).detach() for name in self._names[module]}
        single = isinstance(output, Tensor)
        call = _Call(module, values, args, kwargs, single)
        self._expected.update(owned.values())
        if single:
            output.register_hook(partial(self._single, call))
            return output
        self._late.append(call)  # some of its outputs may never have a gradient
        # one output may be made of another: on its way out each is a tensor of its own, so that
        # the hook sees only what comes from outside
        parts = [_alias(part) if _differentiable(part) else part for part in output]
        for place, part in enumerate(parts):
            if _differentiable(part):
                part.register_hook(partial(_note, call, place))
        return tuple(parts)

    def _single(self, call: _Call, grad: Tensor) -> None:
        call.grads[0] = grad
        with torch.no_grad():
            self._called(call)

    def _called(self, call: _Call) -> None:
        owned = self._owned[call.module]
        if not call.grads:
            return
        for name, use in _uses(call, tuple(owned), self.batch).items():
            self._add(owned[name], use, 1)


def _uses(call: _Call, names: tuple[str, ...], batch: tuple[int, int]) -> dict[str, Use]:
    """What one call adds to the gradients of the module's weights, by their names in it."""
    from transformers.pytorch_utils import Conv1D

    module, args = call.module, call.args
    value = call.values[names[0]]
    single = call.single and len(args) == 1 and not call.kwargs
    wide = torch.promote_types(value.dtype, torch.float32)
    if single and isinstance(module, nn.Linear | Conv1D):
        put, out = (_by_row(t, module, batch).to(wide) for t in (args[0], call.grads[0]))
        pair = (out, put) if isinstance(module, nn.Linear) else (put, out)
        made: dict[str, Use] = {"weight": Outer(*pair)}
        if "bias" in names:
            made["bias"] = Flat(out.sum(1))
        return {name: made[name] for name in names}
    if single and type(module).forward is nn.Embedding.forward:
        ids, out = args[0], call.grads[0]
        if ids.shape != batch:
            raise _mixed(module, ids)
        if module.padding_idx is not None:  # this vector never learns
            out = out.masked_fill((ids == module.padding_idx).unsqueeze(2), 0)
        return {"weight": Lookup(ids, out.to(wide))}
    if single and all(value.ndim == 1 for value in call.values.values()):
        put, out = (_rows(t, module, batch) for t in (args[0], call.grads[0]))
        grads = _by_vmap(call, put, out)
        return {name: Flat(grads[name].to(wide)) for name in names}
    return {
        name: Rerun(module, name, call.values, args, call.kwargs, call.grads, batch)
        for name in names
    }


def _by_vmap(call: _Call, put: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Gradients (B, n) of a small module's weights: its own derivative, mapped over the rows."""

    def one(put_1: Tensor, out_1: Tensor) -> dict[str, Tensor]:
        def forward(values: dict[str, Tensor]) -> Tensor:
            found: Tensor = torch.func.functional_call(call.module, values, (put_1[None],))
            return found

        with torch.enable_grad():
            pull = torch.func.vjp(forward, call.values)[1]
        found: dict[str, Tensor] = pull(out_1[None])[0]
        return found

    mapped: dict[str, Tensor] = torch.func.vmap(one)(put, out)
    return mapped


def _rows(value: Tensor, module: nn.Module, batch: tuple[int, int]) -> Tensor:
    """(B, ...) of what may have its first two dimensions in one."""
    B, T = batch
    if value.shape[0] == B:
        return value.detach()
    if value.shape[0] == B * T:
        return value.detach().view(B, T, *value.shape[1:])
    raise _mixed(module, value)


def _by_row(value: Tensor, module: nn.Module, batch: tuple[int, int]) -> Tensor:
    """(B, positions, features) of any layout that keeps the rows apart."""
    return _rows(value, module, batch).reshape(batch[0], -1, value.shape[-1])


def _mixed(module: nn.Module, value: Tensor) -> RequestError:
    return RequestError(
        f"levers.ewc: {type(module).__name__} mixes rows of text (it was given a tensor of shape "
        f"{tuple(value.shape)}), so the gradient of each row cannot be told; set "
        "levers.ewc.weight to 0 and use levers.l2_sp, which needs no Fisher"
    )


def _wanting(output: Tensor) -> Tensor:
    """The same values, but with a gradient; not a leaf, so that it may be changed in place."""
    return output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)


def _differentiable(part: Any) -> bool:
    return isinstance(part, Tensor) and part.requires_grad


def _alias(part: Tensor) -> Tensor:
    return part.view_as(part)


def _note(call: _Call, place: int, grad: Tensor) -> None:
    call.grads[place] = grad
