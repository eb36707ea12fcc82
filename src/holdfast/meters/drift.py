"""Drift: how far the weights have moved from where this stage began.

A LoRA pair stands for the matrix s B A, so its displacement is that of the product, from the Gram
matrices alone (r x r, the product is never formed):

    ||s (B A - B0 A0)||_F^2 = s^2 ( <B'B, AA'> - 2 <B'B0, AA0'> + <B0'B0, A0A0'> )

Where the matrix is one of E experts fused into one 3-D parameter, A and B hold a pair for each, and
their squares add up. Any other adapter (DoRA, OFT, OSF, ...) is asked what it does to unit vectors,
in float32: its rows less those of its base are the change, some rows at a time. Every other trained
tensor is compared with its own start.

Singular values of the change, likewise without the product: s (B A - B0 A0) = s U V with
U = [B, -B0] = Q_u R_u and V' = [A; A0]' = Q_v R_v are those of s R_u R_v', 2 r x 2 r numbers. Of
anything else see `ranks.py`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.meters import Reading
from holdfast.meters.checkpoints import side_by_side
from holdfast.meters.ranks import singular_values

if TYPE_CHECKING:
    from torch import Tensor

UNIT_VECTORS = 1024
"""Unit vectors that an adapter is asked about at once."""
ROUNDING = 4
"""Change at the start, in units of float32's precision, that is no change: DoRA and OFT begin at
the base up to rounding only."""
BLOCK = re.compile(r"(.*?\.\d+)\.")
"""The block that a tensor belongs to: its name up to the first number."""


@dataclass(frozen=True)
class Displacement:
    """Frobenius norms of the change and of the start, by tensor and in total."""

    change: dict[str, float]
    start: dict[str, float]

    @property
    def relative(self) -> float:
        """||W - W0|| / ||W0|| over all trained tensors together."""
        if not self.change:
            return 0.0
        start = math.hypot(*self.start.values())
        return self.norm / start if start else math.nan

    @property
    def norm(self) -> float:
        """||W - W0|| over all trained tensors together."""
        return math.hypot(*self.change.values())

    @property
    def by_tensor(self) -> dict[str, float]:
        """||W - W0|| / ||W0|| of each; one that began at zero has no relative size."""
        return {n: moved / self.start[n] for n, moved in self.change.items() if self.start[n]}

    @property
    def by_block(self) -> dict[str, float]:
        """||W - W0|| / ||W0|| over the tensors of each block, such as `model.layers.3`."""
        tensors: dict[str, list[str]] = defaultdict(list)
        for name in self.change:
            if found := BLOCK.match(name):
                tensors[found[1]].append(name)
        parts = {
            block: Displacement({n: self.change[n] for n in ns}, {n: self.start[n] for n in ns})
            for block, ns in tensors.items()
        }
        return {block: part.relative for block, part in parts.items() if any(part.start.values())}

    def readings(self, step: int) -> list[Reading]:
        """Relative displacement: one reading a tensor, a block, and one in total."""
        named = [("drift", *pair) for pair in [*self.by_tensor.items(), ("total", self.relative)]]
        named += [("drift_block", *pair) for pair in self.by_block.items()]
        return [
            Reading(meter, name, "train", step, value, None, 1, "relative")
            for meter, name, value in named
        ]


class _Part(Protocol):
    """Something of the model that moves as one."""

    trained: list[Tensor]

    def size(self) -> float:
        """||W0||_F."""

    def change(self) -> float:
        """||W - W0||_F now."""

    def scale(self, factor: float) -> None:
        """Shrink the change to `factor` of what it is."""

    def spectrum(self) -> Tensor | None:
        """Singular values of the change (E, k), largest first; None of a vector."""

    def experts(self) -> tuple[Tensor, Tensor] | None:
        """||W - W0||_F and ||W0||_F of each expert (E,); None where W is not a stack of them."""


class Start:
    """The trained tensors as they were when this was constructed (kept on the CPU)."""

    def __init__(self, model: Any) -> None:
        parts = dict[str, _Part](_adapted(model))
        claimed = {id(p) for part in parts.values() for p in part.trained}
        self._keep(
            parts
            | {
                name: _Whole(parameter, _cpu(parameter))
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and id(parameter) not in claimed
            }
        )

    @classmethod
    def of_tuned(cls, tuned: Any, base: Any = None) -> Start:
        """The start of a checkpoint that some training has left: its base.

        An adapter's change is all that it adds to the weights below it. Every other tensor counts
        that differs from that of `base`; without one, none does. Of a resized vocabulary the rows
        that both have are compared.

        Raises:
            RequestError: the two are not of one architecture.
        """
        parts = dict[str, _Part](_adapted(tuned, from_base=True))
        if base is not None:
            claimed = {id(p) for part in parts.values() for p in part.trained}
            for name, now, then in side_by_side(tuned, base, claimed):
                whole = _Whole(now, then)
                if whole.change():
                    parts[name] = whole
        start = cls.__new__(cls)
        start._keep(parts)
        return start

    def _keep(self, parts: dict[str, _Part]) -> None:
        self._parts = parts
        self._sizes = {name: part.size() for name, part in parts.items()}

    def spectra(self) -> dict[str, Tensor]:
        """Singular values of each matrix's change now, (E, k): E experts, 1 of a plain matrix."""
        found = {name: part.spectrum() for name, part in self._parts.items()}
        return {name: values for name, values in found.items() if values is not None}

    def experts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """||W - W0|| and ||W0|| of each expert (E,), by the parameter that the experts share."""
        found = {name: part.experts() for name, part in self._parts.items()}
        return {name: pair for name, pair in found.items() if pair is not None}

    def displacement(self) -> Displacement:
        """Distance of the weights as they are now."""
        return Displacement({n: part.change() for n, part in self._parts.items()}, self._sizes)

    def scale(self, factor: float, name: str | None = None) -> None:
        """Shrink the displacement, or that of one tensor, to `factor` of what it is.

        Exact for plain tensors and for LoRA that starts at B = 0 (the change is s B A: scaling B
        scales it); what any other adapter trains is interpolated tensor by tensor.
        """
        for part in self._parts.values() if name is None else [self._parts[name]]:
            part.scale(factor)

    def way(self) -> Callable[[float], None]:
        """What puts the weights anywhere between the start (0) and where they are now (1).

        Each time from both ends, so that rounding does not add up; the ends are kept on the CPU.
        """
        ends = [(part, [_cpu(tensor) for tensor in part.trained]) for part in self._parts.values()]

        def put(position: float) -> None:
            import torch

            with torch.no_grad():
                for part, end in ends:
                    for now, last in zip(part.trained, end, strict=True):
                        now.copy_(last)
                    part.scale(position)

        return put


class _Whole:
    """A tensor that is trained itself."""

    def __init__(self, parameter: Tensor, start: Tensor) -> None:
        self.trained, self._start = [parameter], start

    def size(self) -> float:
        return float(self._start.float().norm())

    def change(self) -> float:
        return float(self._change().norm())

    def scale(self, factor: float) -> None:
        _interpolate(self.trained, [self._start], factor)

    def spectrum(self) -> Tensor | None:
        change = self._change()
        if change.ndim < 2:
            return None
        return singular_values(change if change.ndim == 3 else change.flatten(1)[None])

    def experts(self) -> tuple[Tensor, Tensor] | None:
        if self._start.ndim != 3:
            return None
        return _norms(self._change()), _norms(self._start)

    def _change(self) -> Tensor:
        (now,) = self.trained
        return now.detach().float() - self._start.to(now.device).float()


class _Pair:
    """A LoRA pair, or one for each fused expert."""

    def __init__(self, module: Any, adapter: str, parameter: str, from_base: bool) -> None:
        self.trained = [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
        self._starts = [_cpu(t) for t in self.trained]
        if from_base:
            self._starts[1].zero_()
        self._scaling = float(module.scaling[adapter])
        self._experts: int = getattr(module, "num_experts", 1)
        self._base = module.get_base_layer()
        self._parameter = parameter

    def size(self) -> float:
        return _size(self._base, self._parameter)

    def change(self) -> float:
        return float(self._changes().norm())

    def scale(self, factor: float) -> None:
        only_b = not self._starts[1].any()
        _interpolate(self.trained[only_b:], self._starts[only_b:], factor)

    def spectrum(self) -> Tensor:
        import torch

        a, b, a0, b0 = self._factors()
        if self._starts[1].any():
            b, a = torch.cat([b, -b0], 2), torch.cat([a, a0], 1)
        upper_b, upper_a = (torch.linalg.qr(t, mode="r").R for t in (b, a.mT))
        values: Tensor = torch.linalg.svdvals(upper_b @ upper_a.mT)
        return self._scaling * values

    def experts(self) -> tuple[Tensor, Tensor] | None:
        weight: Tensor = getattr(self._base, self._parameter)
        return (self._changes(), _norms(weight)) if weight.ndim == 3 else None

    def _changes(self) -> Tensor:
        return self._scaling * _product_distances(*self._factors())

    def _factors(self) -> tuple[Tensor, ...]:
        """A (E, r, in), B (E, out, r), A0, B0 as peft lays the experts out, in float64."""
        a, b, a0, b0 = (
            t.detach().to(self.trained[0].device).double() for t in (*self.trained, *self._starts)
        )
        experts = self._experts
        a, a0 = (t.view(experts, -1, t.shape[1]) for t in (a, a0))
        b, b0 = (t.view(t.shape[0], -1, experts).permute(2, 0, 1) for t in (b, b0))
        return a, b, a0, b0


class _Layer:
    """A layer with any other adapter: what it does to unit vectors, less what its base does."""

    def __init__(self, module: Any, trained: list[Tensor], from_base: bool) -> None:
        self.trained, self._module = trained, module
        self._starts = [_cpu(t) for t in trained]
        self._change_at_start: list[Tensor] = []
        if from_base:
            return
        import torch

        rows = [row.cpu() for row in self._rows()]
        moved = math.hypot(*(float(row.norm()) for row in rows))
        if moved > ROUNDING * torch.finfo(torch.float32).eps * self.size():
            self._change_at_start = rows

    def size(self) -> float:
        return _size(self._module.get_base_layer(), "weight")

    def change(self) -> float:
        return math.hypot(*(float(row.norm()) for row in self._changed()))

    def scale(self, factor: float) -> None:
        _interpolate(self.trained, self._starts, factor)

    def spectrum(self) -> Tensor:
        """Of the rows all together; a trained bias is one more."""
        import torch

        return singular_values(torch.cat(list(self._changed()))[None])

    def experts(self) -> None:
        return None

    def _changed(self) -> Iterator[Tensor]:
        starts = iter(self._change_at_start)
        for row in self._rows():
            yield row - next(starts, row.new_zeros(())).to(row)

    def _rows(self) -> Iterator[Tensor]:
        """The change of the weight's rows (as input sees them), `UNIT_VECTORS` at a time."""
        import torch
        from torch import nn

        base = self._module.get_base_layer()
        lookup = isinstance(base, nn.Embedding)
        device = self.trained[0].device
        count = base.num_embeddings if lookup else _inputs(base)
        training = self._module.training
        self._module.eval()  # no dropout
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                nothing = torch.zeros(1, count, device=device)
                constant = 0.0 if lookup else self._added(nothing)
                if isinstance(constant, torch.Tensor):
                    yield constant  # a trained bias
                for first in range(0, count, UNIT_VECTORS):
                    numbers = torch.arange(first, min(first + UNIT_VECTORS, count), device=device)
                    asked = numbers
                    if not lookup:
                        asked = nothing.new_zeros(len(numbers), count)
                        asked[torch.arange(len(numbers), device=device), numbers] = 1.0
                    yield self._added(asked) - constant
        finally:
            self._module.train(training)

    def _added(self, put: Tensor) -> Tensor:
        """module(put) - base(put) in float32, whatever the weights are held in."""
        base = self._module.get_base_layer()
        return _in_float32(self._module, put) - _in_float32(base, put)


def _in_float32(module: Any, put: Tensor) -> Tensor:
    import torch

    held = [*module.named_parameters(), *module.named_buffers()]
    wide = {name: t.float() for name, t in held if t.is_floating_point()}
    out: Tensor = torch.func.functional_call(module, wide, (put,))
    return out.float()


def _interpolate(trained: list[Tensor], starts: list[Tensor], factor: float) -> None:
    import torch

    with torch.no_grad():
        for now, start in zip(trained, starts, strict=True):
            wide = torch.promote_types(now.dtype, torch.float32)
            began = start.to(now.device, wide)
            now.copy_(began + factor * (now.to(wide) - began))


def _adapted(model: Any, *, from_base: bool = False) -> Iterator[tuple[str, _Part]]:
    """(name of the matrix, what moves it) for each layer that has an adapter which is trained.

    From the base: of every adapter that is on, and its start is that it adds nothing.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        trained = {
            own: p
            for own, p in module.named_parameters()
            if (p.requires_grad or from_base) and not own.startswith("base_layer.")
        }
        if not trained:
            continue
        short = name.removeprefix("base_model.model.")
        parameter = getattr(module, "parameter_name", "")  # of fused experts; else "weight"
        if parameter:
            short = f"{short.removesuffix('.base_layer')}.{parameter}"
        (adapter,) = module.active_adapters
        pair = sorted(trained) == [f"lora_{factor}.{adapter}.weight" for factor in "AB"]
        if pair and adapter not in getattr(module, "lora_variant", {}):
            yield short, _Pair(module, adapter, parameter or "weight", from_base)
        elif isinstance(module.get_base_layer(), nn.Embedding) or _inputs(module.get_base_layer()):
            try:
                part = _Layer(module, list(trained.values()), from_base)
            except (RuntimeError, ValueError, TypeError):
                continue  # it is no function of unit vectors: its tensors are compared as they are
            yield short, part


def _inputs(base: Any) -> int:
    """Numbers that a linear layer takes; 0 where it is none."""
    if type(base).__name__ == "Conv1D":
        return int(base.weight.shape[0])
    weight = getattr(base, "weight", None)
    return int(getattr(base, "in_features", 0)) if weight is not None else 0


def _size(base: Any, parameter: str) -> float:
    """||W||_F; of a quantized weight, of what it stands for."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = getattr(base, parameter)
    if not weight.is_floating_point():
        weight = dequantize_module_weight(base)
    return float(weight.detach().float().norm())


def _product_distances(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
    """||B A - B0 A0||_F of each expert (E,); shapes (E, r, in) and (E, out, r)."""
    square = ((b.mT @ b) * (a @ a.mT)).sum((1, 2))
    square -= 2 * ((b.mT @ b0) * (a @ a0.mT)).sum((1, 2))
    square += ((b0.mT @ b0) * (a0 @ a0.mT)).sum((1, 2))
    return square.clamp(min=0).sqrt()


def _norms(stack: Tensor) -> Tensor:
    """Frobenius norm of each of (E, m, n), in float64."""
    norm_E: Tensor = stack.detach().flatten(1).float().norm(dim=1)
    return norm_E.double()


def _cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().clone()
