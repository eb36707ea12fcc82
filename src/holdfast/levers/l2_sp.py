"""L2-SP: hold the weights near where this stage began, all alike.

Source: Li, Grandvalet & Davoine 2018 (L2-SP, the starting point).
Equation: weight / 2 * ||W - W0||_F^2 over what is trained; for an adapter over the product,
||s B A||_F^2 = s^2 tr(A A' B' B), which is never formed (`displacement.py`).
Acts on: loss.
Estimator: exact; no data is read.
Cost: one more copy of what is trained; under LoRA 2 r^2 (in + out) multiplications a matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PrivateAttr

from holdfast.levers import Lever, Memory, Setup, StepState, Term, TokenLosses

if TYPE_CHECKING:
    from holdfast.displacement import Moved


class L2Sp(Lever):
    """A pull back to the start of this stage, the same for every weight. Off unless asked for."""

    OFF: ClassVar = {"weight": 0.0}
    reads_losses: ClassVar = False

    weight: float = Field(default=0.0, ge=0.0)
    """Weight of half the squared distance beside the lesson's mean loss (nats a token). 0 turns it
    off."""
    _moved: dict[str, Moved] = PrivateAttr(default_factory=dict)

    def prepare(self, setup: Setup) -> None:
        """Remember the start. Raises RequestError where an adapter's change is no matrix."""
        if self.weight == 0:
            return
        from holdfast.displacement import moved

        self._moved = moved(setup.model, "levers.l2_sp")

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        """Weight * half the squared distance, once a step: each micro-batch adds its part."""
        if self.weight == 0:
            return {}
        import torch

        total = torch.stack([change.quadratic() for change in self._moved.values()]).sum()
        return {"l2_sp": Term(0.5 * total, state.micro_batches, self.weight)}
