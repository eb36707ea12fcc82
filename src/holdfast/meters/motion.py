"""Motion: is the path to where the weights are now what its arithmetic says it is?

Three questions whose answers are known to go wrong together with a run:

- `gradient`: how much of the gradient is near zero. Tensors that see no gradient (an expert without
  a token, a saturated unit) will not move, whatever the learning rate.
- `walk`: lr x steps x mean gradient norm against ||W - W0||. Plain descent in a straight line gives
  a ratio of 1; a path that turns back gives less; a ratio over 1 is what an optimizer's own scaling
  (Adam's) adds. Under an adapter the gradient is that of its factors, and the displacement that of
  their product: compare runs of one kind.
- `fisher`: 1/2 sum_i F_i (W_i - W0_i)^2, to second order KL(base || tuned) in nats a token on the
  text that F is of, against what was measured. Far from 1: the change is no longer small, or is
  along directions that a diagonal F does not see.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.meters import Reading

if TYPE_CHECKING:
    from holdfast.displacement import Moved
    from holdfast.fisher import Importance
    from holdfast.meters.drift import Displacement

NEAR_ZERO = 1e-3
"""An entry of a gradient is near zero below this share of the whole gradient's root mean square."""


def read_gradient(model: Any, step: int, near_zero: float = NEAR_ZERO) -> list[Reading]:
    """Share of the gradient's entries that are near zero: by trained tensor, and in total.

    Call it between backward and the optimizer's step. A tensor without a gradient counts as zero.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    square = sum(
        float(p.grad.detach().float().square().sum())
        for p in trained.values()
        if p.grad is not None
    )
    count = sum(p.numel() for p in trained.values())
    if not count:
        return []
    threshold = near_zero * math.sqrt(square / count)
    small = {
        name: p.numel() if p.grad is None else int((p.grad.detach().abs() <= threshold).sum())
        for name, p in trained.items()
    }
    shares = [(name, small[name] / p.numel(), p.numel()) for name, p in trained.items()]
    shares.append(("total", sum(small.values()) / count, count))
    return [
        Reading("gradient_near_zero", name, "train", step, share, None, n, "share")
        for name, share, n in shares
    ]


@dataclass
class Walk:
    """What the steps add up to. Tell it of every step, or of every so-many-th alike."""

    logged: int = 0
    """Steps told of."""
    lengths: float = 0.0
    """Sum of learning rate x gradient norm over them."""

    def add(self, learning_rate: float, grad_norm: float) -> None:
        """One step, after clipping; one that was refused did not move: its length is 0."""
        if not math.isfinite(learning_rate * grad_norm):
            return
        self.logged += 1
        self.lengths += learning_rate * grad_norm

    @classmethod
    def of(
        cls,
        readings: Iterable[Reading],
        clip: float | None = None,
        refused: Container[int] = (),
    ) -> Walk:
        """From the `learning_rate` and `grad_norm` of a run's `readings.jsonl`.

        Args:
            readings: in any order; a step that has only one of the two is left out.
            clip: the norm that gradients were clipped to; what is recorded is before clipping.
            refused: steps that were refused, numbered as the readings are.
        """
        at: dict[str, dict[int, float]] = {"learning_rate": {}, "grad_norm": {}}
        for reading in readings:
            if reading.meter in at:
                at[reading.meter][reading.step] = reading.value
        walk = cls()
        for step, rate in sorted(at["learning_rate"].items()):
            if step in refused:
                walk.add(0.0, 0.0)
            elif step in at["grad_norm"]:
                walk.add(rate, min(at["grad_norm"][step], clip or math.inf))
        return walk

    def read(self, displacement: Displacement, step: int) -> list[Reading]:
        """The walk's length (`walk`), the displacement's norm, and their ratio; none at step 0."""
        if not self.logged or not self.lengths:
            return []
        walked = self.lengths / self.logged * step
        values = {
            "walked": (walked, "norm"),
            "displacement": (displacement.norm, "norm"),
            "displacement / walked": (displacement.norm / walked, "ratio"),
        }
        return [
            Reading("walk", name, "train", step, value, None, self.logged, unit)
            for name, (value, unit) in values.items()
        ]


def read_fisher(
    moved: Mapping[str, Moved],
    importance: Mapping[str, Importance],
    measured: Sequence[Reading],
    step: int,
) -> list[Reading]:
    """The predicted rise in nats a token, and predicted / measured for each measured rise.

    Args:
        moved: `displacement.moved(model, ...)`, made when training began.
        importance: F of each, as `fisher.fisher` or the `ewc` lever made it then.
        measured: rises in nats a token on text of F's kind: `kl` on old text, `canary_kl`. The
            ratio's error is that of the measured rise (delta method); F's own is not in it.
    """
    import torch

    with torch.no_grad():
        parts = [change.quadratic(importance[name]) for name, change in moved.items()]
        predicted = 0.5 * math.fsum(float(part) for part in parts)
    found = [Reading("fisher", "predicted", "train", step, predicted, None, len(parts), "nats")]
    for reading in measured:
        if reading.unit != "nats" or not reading.value:
            continue
        ratio = predicted / reading.value
        known = reading.stderr is not None
        stderr = abs(ratio / reading.value) * (reading.stderr or 0.0) if known else None
        name = f"predicted / {reading.meter} {reading.name}"
        found.append(
            Reading("fisher", name, reading.split, step, ratio, stderr, reading.n, "ratio")
        )
    return found
