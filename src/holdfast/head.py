"""A model's output head: hidden states -> logits, in fp32, and a gradient's way back.

Shape suffixes: C positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


@dataclass(frozen=True)
class Head:
    """The output head as a function: l = cap * tanh(scale * (h W^T + b) / cap).

    `scale` and `cap` are the ecosystem's logit multiplier (Cohere, Granite) and final logit
    soft-capping (Gemma 2); 1 and None for most models.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits (..., V) of hidden states (..., H): float64 where the head is, else fp32."""
        hidden_CH = hidden.reshape(-1, hidden.shape[-1]).to(self.weight_VH.dtype)
        logits_CV = product(hidden_CH, self.weight_VH.T, out)
        if self.bias_V is not None:
            logits_CV = logits_CV.add_(self.bias_V)
        if self.scale != 1.0:
            logits_CV = logits_CV.mul_(self.scale)
        if self.cap is not None:
            capped_CV = torch.tanh(logits_CV / self.cap) * self.cap
            logits_CV = capped_CV if out is None else out.copy_(capped_CV)
        return logits_CV.view(*hidden.shape[:-1], self.weight_VH.shape[0])

    def first(self, tokens: int) -> Head:
        """The head over the first tokens of its vocabulary: a view."""
        if tokens == self.weight_VH.shape[0]:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:tokens]
        return replace(self, weight_VH=self.weight_VH[:tokens], bias_V=bias_V)

    def slope(self, logits_CV: Tensor) -> Tensor | None:
        """What the soft cap multiplies a gradient with, elementwise; None where there is no cap."""
        return None if self.cap is None else 1 - (logits_CV / self.cap) ** 2

    def local(self, device: str) -> Head:
        """The head whole on this device (FSDP2: gathered) and in the dtype that is computed in."""
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.weight_VH.dtype

        def local(tensor: Tensor) -> Tensor:
            if isinstance(tensor, DTensor):
                # each process has other rows: FSDP2 averages their gradients
                average = [Partial("avg")] * tensor.device_mesh.ndim
                tensor = tensor.full_tensor(grad_placements=average)
            return tensor.to(dtype)

        bias_V = None if self.bias_V is None else local(self.bias_V)
        return replace(self, weight_VH=local(self.weight_VH), bias_V=bias_V)

    def pullback(self, grad_CV: Tensor) -> Tensor:
        """(C, H) of a gradient with respect to scale (h W^T + b), over all tokens or the first."""
        weight_VH = self.weight_VH[: grad_CV.shape[1]]
        return product(grad_CV.to(weight_VH.dtype), weight_VH).mul_(self.scale)

    def detach(self) -> Head:
        """The same head, as a constant."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VH=self.weight_VH.detach(), bias_V=bias_V)

    @property
    def trained(self) -> bool:
        """Whether the head's own weights take a gradient."""
        return self.weight_VH.requires_grad or (
            self.bias_V is not None and self.bias_V.requires_grad
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits, values and sums are held in."""
    return torch.promote_types(dtype, torch.float32)


WIDE_PRODUCT = hasattr(torch.ops.aten.mm, "dtype")
"""Whether this torch has products of bf16 that are not rounded to bf16 (on CUDA only)."""


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A @ b in fp32 or wider. A CPU sums bf16 in fp32 too, but rounds the result once."""
    into = {} if out is None else {"out": out}
    if a.dtype == wide(a.dtype):
        return torch.mm(a, b, **into)
    if a.is_cuda and WIDE_PRODUCT:
        return torch.mm(a, b, out_dtype=torch.float32, **into)
    rounded = torch.mm(a, b)
    return rounded.float() if out is None else out.copy_(rounded)


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Total += scale * (a @ b), in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    else:
        total.add_(product(a, b), alpha=scale)
