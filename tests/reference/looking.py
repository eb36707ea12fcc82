"""Shared by the tests of references: a batch, and what a reference sees of it as plain logits."""

from __future__ import annotations

from typing import Any

import torch

import tiny

IDS = torch.arange(24).reshape(2, 12) * 5 % tiny.VOCABULARY
POSITIONS = torch.arange(12).expand(2, -1)
EVERY = torch.ones_like(IDS, dtype=torch.bool)


def logits(model: Any) -> torch.Tensor:
    """(B, W, V) by the model's own forward pass."""
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    return out


def seen_by(reference: Any) -> torch.Tensor:
    """(B, W, V) by the reference."""
    base = reference.view(IDS, POSITIONS, EVERY)
    assert not base.hidden_MH.requires_grad
    with torch.no_grad():
        out: torch.Tensor = base.head(base.hidden_MH)
    return out.reshape(*IDS.shape, -1)
