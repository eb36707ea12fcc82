"""Drift: how far the weights have moved from where this stage began.

A LoRA pair stands for the matrix s B A, so its displacement is that of the product, from the Gram
matrices alone (r x r, the product is never formed):

    ||s (B A - B0 A0)||_F^2 = s^2 ( <B'B, AA'> - 2 <B'B0, AA0'> + <B0'B0, A0A0'> )

Where the matrix is one of E experts fused into one 3-D parameter, A and B hold a pair for each, and
their squares add up. Every other trained tensor is compared with its own start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.meters import Reading

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Displacement:
    """Frobenius norms of the change and of the start, by tensor and in total."""

    change: dict[str, float]
    start: dict[str, float]

    @property
    def relative(self) -> float:
        """||W - W0|| / ||W0|| over all trained tensors together."""
        start = math.hypot(*self.start.values())
        return math.hypot(*self.change.values()) / start if start else math.nan

    def readings(self, step: int) -> list[Reading]:
        """One reading a tensor (relative displacement) and one in total."""
        layers = [
            (name, self.change[name] / self.start[name]) for name in self.change if self.start[name]
        ]
        return [
            Reading("drift", name, "train", step, value, None, 1, "relative")
            for name, value in [*layers, ("total", self.relative)]
        ]


class Start:
    """The trained tensors as they were when this was constructed (kept on the CPU)."""

    def __init__(self, model: Any) -> None:
        self._pairs = dict(_lora_pairs(model))
        in_pairs = {id(p) for a, b, *_ in self._pairs.values() for p in (a, b)}
        self._tensors = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in in_pairs
        }
        self._pair_starts = {n: (_cpu(a), _cpu(b)) for n, (a, b, *_) in self._pairs.items()}
        self._tensor_starts = {name: _cpu(p) for name, p in self._tensors.items()}
        self._norms = {
            n: float(base.detach().float().norm()) for n, (*_, base) in self._pairs.items()
        }
        self._norms |= {n: float(p.float().norm()) for n, p in self._tensor_starts.items()}

    def displacement(self) -> Displacement:
        """Distance of the weights as they are now."""
        change = {}
        for name, (a, b, scale, experts, _) in self._pairs.items():
            a0, b0 = self._pair_starts[name]
            change[name] = scale * _product_distance(a, b, a0, b0, experts)
        for name, parameter in self._tensors.items():
            before = self._tensor_starts[name].to(parameter.device)
            change[name] = float((parameter.detach().float() - before.float()).norm())
        return Displacement(change, self._norms)

    def scale(self, factor: float) -> None:
        """Shrink the displacement to `factor` of what it is.

        Exact for plain tensors and for LoRA that starts at B = 0 (the change is s B A: scaling B
        scales it); a pair that starts elsewhere is interpolated factor by factor.
        """
        import torch

        with torch.no_grad():
            for name, (a, b, *_) in self._pairs.items():
                a0, b0 = (t.to(a.device) for t in self._pair_starts[name])
                b.copy_(b0 + factor * (b - b0))
                if b0.any():
                    a.copy_(a0 + factor * (a - a0))
            for name, parameter in self._tensors.items():
                start = self._tensor_starts[name].to(parameter.device)
                parameter.copy_(start + factor * (parameter - start))


def _lora_pairs(model: Any) -> Any:
    """(name of the matrix, (A, B, scaling, experts, base weight)) for each LoRA pair."""
    for name, module in model.named_modules():
        factors = getattr(module, "lora_A", None)
        if not factors or not hasattr(module, "get_base_layer"):
            continue
        parameter = getattr(module, "parameter_name", "")  # of fused experts; else "weight"
        weight = getattr(module.get_base_layer(), parameter or "weight", None)
        for adapter, layer in factors.items():
            a, b = layer.weight, module.lora_B[adapter].weight
            if weight is None or not a.requires_grad or a.ndim != 2:
                continue
            short = name.removeprefix("base_model.model.")
            if parameter:
                short = f"{short.removesuffix('.base_layer')}.{parameter}"
            experts = getattr(module, "num_experts", 1)
            yield short, (a, b, float(module.scaling[adapter]), experts, weight)


def _product_distance(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, experts: int) -> float:
    """||B A - B0 A0||_F, shapes (E r, in) and (out, r E) as peft lays the experts out."""
    a, a0 = (t.detach().to(a).double().view(experts, -1, a.shape[1]) for t in (a, a0))
    b, b0 = (
        t.detach().to(b).double().view(b.shape[0], -1, experts).permute(2, 0, 1) for t in (b, b0)
    )
    square = ((b.mT @ b) * (a @ a.mT)).sum()
    square -= 2 * ((b.mT @ b0) * (a @ a0.mT)).sum()
    square += ((b0.mT @ b0) * (a0 @ a0.mT)).sum()
    return math.sqrt(max(0.0, float(square)))


def _cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().clone()
