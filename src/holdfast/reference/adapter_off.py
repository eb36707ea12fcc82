"""The base is the tuned model with its adapter switched off: no second copy of the weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from holdfast import model as models

if TYPE_CHECKING:
    import torch

    from holdfast.objective import Head


class AdapterOff:
    """Reference for adapters that are added in this stage.

    Raises:
        ValueError: the model has no adapter, so that switching it off would not yield the base.
    """

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ValueError("adapter_off needs a peft model; use the frozen reference instead")
        self.model = model

    def head(self) -> Head:
        """The base's own head, also where the tuned one is trained beside the adapter."""
        layer = models.causal_lm(self.model).get_output_embeddings()
        trained_too = hasattr(layer, "original_module")  # switching is not free: only where needed
        with self.model.disable_adapter() if trained_too else nullcontext():
            return models.head(self.model)

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(B, W, H), no gradient."""
        import torch

        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.model.disable_adapter():
                return models.hidden_states(self.model, input_ids, position_ids)
        finally:
            self.model.train(training)
