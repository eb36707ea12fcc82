"""References: where the base's hidden states come from. One file a source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from holdfast.objective import Head


class Reference(Protocol):
    """The start of this stage, as a function. It never takes a gradient."""

    def head(self) -> Head:
        """The base's output head."""
        ...

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The base's last hidden states (B, W, H)."""
        ...
