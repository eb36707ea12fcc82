"""Budget: how far and how fast the weights may move.

Sources: learning rate LoRA 5e-4 (2000 / H)^0.781, H the hidden size (tinker-cookbook,
hyperparam_utils); full fine-tuning a tenth of that ("LoRA Without Regret", 2025: LoRA's best rate
is about ten times that of full fine-tuning), which at H = 4096 is 2.9e-5 and safe beside the anchor
only: without it, the classic recipe's is 1e-6 to 5e-6. Clipping: Pascanu et al. 2013.
Acts on: the step. Displacement is about learning rate x steps x mean gradient norm.
What the ceilings promise:
`cap`, `cap_per_layer`: after every step each ball holds, to the rounding of the weights.
`kl_cap`: after a step whose own anchor rows measured a mean KL above it, the displacement is shrunk
by sqrt(kl_cap / KL), which to second order is where KL is kl_cap, for it is quadratic along the ray
to the start. So it may be exceeded by one step's move and by the sampling of that step's rows.
Cost: none; the caps on displacement measure it after each step, one on KL is read off the step's
anchor rows.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from holdfast.data.example import Role
from holdfast.errors import HoldfastError, RequestError
from holdfast.levers import (
    Lever,
    Memory,
    StepContext,
    StepState,
    Term,
    TokenLosses,
    shared_sum,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

HISTORY = 64
"""Accepted gradient norms that the spike rule looks back on."""
WARMED_UP = 16
"""Accepted steps before the spike rule starts."""
PATIENCE = 25
"""Refused steps in a row after which training is given up."""
SLACK = 1e-6
"""Relative excess of a cap that is rounding."""
ROUNDS = 32
"""Pulls after which a displacement is taken not to yield; each but the first is by 1 % or more."""


class Budget(Lever):
    """Learning rate, schedule, clipping, displacement cap, refusal of broken steps."""

    OFF: ClassVar = {"clip": 0.0, "spike": 0.0}

    learning_rate: Annotated[float, Field(gt=0.0)] | Literal["auto"] = "auto"
    """Peak learning rate; auto: by mode and hidden size (the formula is in docs/levers.md)."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "linear"
    """After the warm-up: to zero along a line or a cosine, or constant. A line leaves the anchor
    larger last steps, in which what was forgotten on the way is repaired."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the steps with a linearly rising learning rate. 0 turns it off."""
    clip: float = Field(default=1.0, ge=0.0)
    """Upper bound of the gradient's global L2 norm. 0 turns it off."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's decay towards zero. 0 turns it off: decaying a base's weights is drift."""
    cap: float | None = Field(default=None, gt=0.0)
    """Ceiling on ||W - W0|| / ||W0|| over the trained matrices; a step beyond it is pulled back
    onto the ball. Empty turns it off; the displacement is logged all the same."""
    cap_per_layer: float | None = Field(default=None, gt=0.0)
    """Ceiling on ||W - W0|| / ||W0|| of each trained matrix by itself, kept as `cap` is. A tensor
    that begins at zero has no relative size and is held by `cap` alone. Empty turns it off."""
    kl_cap: float | None = Field(default=None, gt=0.0)
    """Ceiling on the mean KL to the base (`kl_anchor`'s divergence) on the step's anchor rows, nats
    a token; beyond it the weights are drawn back towards the start. Empty turns it off."""
    spike: float = Field(default=10.0, ge=0.0)
    """Refuse a step whose gradient norm exceeds this many times the median of the last 64
    accepted ones. 0 turns it off; non-finite steps are always refused."""

    def peak(self, config: Any, adapter: bool) -> float:
        """Peak learning rate for a model of this config."""
        if self.learning_rate != "auto":
            return self.learning_rate
        hidden: int = config.get_text_config().hidden_size
        lora: float = 5e-4 * (2000 / hidden) ** 0.781
        return lora if adapter else lora / 10

    def arguments(self, config: Any) -> dict[str, Any]:
        """Schedule, warm-up, clipping and decay for TrainingArguments."""
        return {
            "lr_scheduler_type": self.schedule,
            "warmup_steps": self.warmup,
            "max_grad_norm": self.clip,
            "weight_decay": self.weight_decay,
        }

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        """No term: the KL of the step's anchor positions is noted for `after_step`."""
        if self.kl_cap is not None:
            step, total, count = memory.get("kl", (state.step, 0.0, 0))
            if step != state.step:
                total, count = 0.0, 0
            anchor = out.kl_roles == Role.ANCHOR
            total += float(shared_sum(out.kl.detach(), anchor))
            memory["kl"] = [state.step, total, count + int(anchor.sum())]
        return {}

    def before_step(self, ctx: StepContext, memory: Memory) -> None:
        """Refuse non-finite and spiking gradients; give up after 25 refusals in a row."""
        accepted: list[float] = memory.setdefault("grad_norms", [])
        reason = ""
        if not math.isfinite(ctx.grad_norm):
            reason = "non-finite gradient"
        elif self.spike and len(accepted) >= WARMED_UP:
            usual = median(accepted)
            if ctx.grad_norm > self.spike * usual > 0:
                reason = f"gradient norm {ctx.grad_norm:.3g} is a spike (usual {usual:.3g})"
        if not reason:
            accepted.append(ctx.grad_norm)
            del accepted[:-HISTORY]
            memory["refused_in_a_row"] = 0
            return
        ctx.refuse(reason)
        memory["refused"] = memory.get("refused", 0) + 1
        memory["refused_in_a_row"] = memory.get("refused_in_a_row", 0) + 1
        if memory["refused_in_a_row"] >= PATIENCE:
            raise HoldfastError(
                f"step {ctx.step}: {PATIENCE} steps in a row were refused ({reason}); the last "
                "checkpoint is good: resume it with a lower levers.budget.learning_rate"
            )

    def after_step(self, ctx: StepContext, memory: Memory) -> None:
        """Draw the weights back: to where KL is `kl_cap`, then onto the balls of the two caps."""
        if self.kl_cap is not None:
            kl = _over_devices(memory.pop("kl", (0, 0.0, 0)))
            if math.isfinite(kl) and kl > self.kl_cap and not ctx.refused:
                ctx.start.scale(math.sqrt(self.kl_cap / kl))
                memory["kl_capped"] = memory.get("kl_capped", 0) + 1
        if self.cap_per_layer is not None or self.cap is not None:
            moved = self._project(ctx)
            memory["capped"] = memory.get("capped", 0) + moved

    def _project(self, ctx: StepContext) -> bool:
        """Pull back what is outside. Returns whether anything was.

        One pull along the ray is exact for full weights and LoRA; other adapters need a few.
        """
        start, most = ctx.start, 1 + SLACK
        for again in range(ROUNDS):
            displacement, outside = start.displacement(), False
            target = 0.99 if again else 1.0
            for name, moved in displacement.by_tensor.items():
                if self.cap_per_layer is not None and moved > self.cap_per_layer * most:
                    start.scale(target * self.cap_per_layer / moved, name)
                    outside = True
            if outside:
                displacement = start.displacement()
            total = displacement.relative
            if self.cap is not None and math.isnan(total):
                raise RequestError(
                    "levers.budget.cap: what is trained starts at zero, so its displacement has no "
                    "relative size; leave the cap out, or train more than that"
                )
            if self.cap is not None and total > self.cap * most:
                start.scale(target * self.cap / total)
                outside = True
            if not outside:
                return again > 0
        raise HoldfastError(
            f"step {ctx.step}: the displacement does not yield to levers.budget's caps; they are "
            "below what rounding leaves, so resume with larger ones"
        )


def _over_devices(noted: Sequence[float]) -> float:
    """Mean KL of the step's anchor positions, the same on every device; 0 without any."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    pair = torch.tensor(noted[1:], dtype=torch.float64)
    if PartialState().num_processes > 1:
        pair = reduce(pair.float().to(PartialState().device), "sum").double()
    total, count = pair.tolist()
    return total / count if count else 0.0
