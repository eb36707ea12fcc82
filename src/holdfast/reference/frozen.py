"""The base is a second, frozen copy of the weights: for full fine-tuning."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from holdfast import model as models

if TYPE_CHECKING:
    import torch

    from holdfast.objective import Head


class Frozen:
    """Reference that copies the model as it is when constructed."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(models.causal_lm(model)).eval().requires_grad_(False)

    def head(self) -> Head:
        """The copy's head."""
        return models.head(self.model)

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(B, W, H), no gradient."""
        import torch

        with torch.no_grad():
            return models.hidden_states(self.model, input_ids, position_ids)
