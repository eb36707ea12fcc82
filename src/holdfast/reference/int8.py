"""Matrices in a byte a weight, for a reference that must be small: W = diag(scale) W8.

Shapes: O outputs, I inputs. Each row has its own scale, its largest weight over 127; what goes in
and comes out is not rounded. Plain torch, on any device: the libraries for it (torchao,
bitsandbytes) are not needed for a model that is only read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from holdfast import model as models


class Int8Linear(nn.Module):
    """y = scale * (x W8^T) + b, computed in the input's dtype."""

    weight_OI: Tensor
    scale_O: Tensor
    bias_O: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        scale_O = weight_OI.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        scale_O = scale_O / 127
        self.register_buffer("weight_OI", (weight_OI / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale_O", scale_O)
        self.register_buffer("bias_O", bias_O)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; one matrix at a time is in the input's dtype."""
        y = nn.functional.linear(x, self.weight_OI.to(x.dtype)) * self.scale_O.to(x.dtype)
        return y if self.bias_O is None else y + self.bias_O.to(x.dtype)


def matrices(model: Any) -> list[tuple[nn.Module, str, Tensor]]:
    """(parent, name, weight (O, I)) of every linear layer of the decoder."""
    lm = models.causal_lm(model)
    head = lm.get_output_embeddings()
    found = []
    for module in lm.modules():
        for name, child in module.named_children():
            if child is not head and isinstance(child, nn.Linear):
                found.append((module, name, child.weight))
            elif child is not head and isinstance(child, Conv1D):
                found.append((module, name, child.weight.T))
    return found


@torch.no_grad()
def quantize(model: Any) -> None:
    """Replace every linear layer of the decoder; embedding, norms and head stay as they are."""
    for module, name, weight in matrices(model):
        setattr(module, name, Int8Linear(weight, getattr(module, name).bias))
