"""References: where the base's probabilities come from. One file a source.

Shape suffixes: B rows, W positions in a row, M positions that need the base, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from holdfast import model as models

if TYPE_CHECKING:
    import torch

    from holdfast.objective import Base


class Reference(Protocol):
    """The start of this stage, as a function. It never takes a gradient."""

    @property
    def reads_rows(self) -> bool:
        """Whether `view` passes rows that have a KL through a model: others are best kept apart."""
        ...

    def view(
        self, input_ids_BW: torch.Tensor, position_ids_BW: torch.Tensor, kl_BW: torch.Tensor
    ) -> Base:
        """The base at the positions where `kl_BW` is True, in row-major order."""
        ...


def hidden_at(
    model: Any, input_ids_BW: torch.Tensor, position_ids_BW: torch.Tensor, kl_BW: torch.Tensor
) -> torch.Tensor:
    """Last hidden states (M, H) at the positions asked for; rows without one are not computed."""
    import torch

    rows_B = kl_BW.any(dim=1)
    if not rows_B.any():
        weight = models.head(model).weight_VH
        return weight.new_empty(0, weight.shape[1])
    with torch.no_grad():
        hidden = models.hidden_states(model, input_ids_BW[rows_B], position_ids_BW[rows_B])
    return hidden[kl_BW[rows_B]]
