"""Budget: how far and how fast the weights may move.

Sources: learning rate LoRA 5e-4 (2000 / H)^0.781, H the hidden size (tinker-cookbook,
hyperparam_utils; "LoRA Without Regret", 2025); full fine-tuning a hundredth of that, which at
H = 4096 is 2.9e-6, inside the 1e-6 to 5e-6 of the classic recipe. Clipping: Pascanu et al. 2013.
Acts on: the step. Displacement is about learning rate x steps x mean gradient norm.
Cost: none; the cap measures the displacement after each step.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any, ClassVar, Literal

from pydantic import Field

from holdfast.errors import HoldfastError, RequestError
from holdfast.levers import Lever, Memory, StepContext

HISTORY = 64
"""Accepted gradient norms that the spike rule looks back on."""
WARMED_UP = 16
"""Accepted steps before the spike rule starts."""
PATIENCE = 25
"""Refused steps in a row after which training is given up."""


class Budget(Lever):
    """Learning rate, schedule, clipping, displacement cap, refusal of broken steps."""

    OFF: ClassVar = {"clip": 0.0, "spike": 0.0}

    learning_rate: float | Literal["auto"] = "auto"
    """Peak learning rate; auto: by mode and hidden size (the formula is in docs/levers.md)."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """After the warm-up: to zero along a cosine or a line, or constant."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the steps with a linearly rising learning rate. 0 turns it off."""
    clip: float = Field(default=1.0, ge=0.0)
    """Upper bound of the gradient's global L2 norm. 0 turns it off."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's decay towards zero. 0 turns it off: decaying a base's weights is drift."""
    cap: float | None = Field(default=None, gt=0.0)
    """Ceiling on ||W - W0|| / ||W0|| over the trained matrices; a step beyond it is pulled back
    onto the ball. Empty turns it off; the displacement is logged all the same."""
    spike: float = Field(default=10.0, ge=0.0)
    """Refuse a step whose gradient norm exceeds this many times the median of the last 64
    accepted ones. 0 turns it off; non-finite steps are always refused."""

    def peak(self, config: Any, adapter: bool) -> float:
        """Peak learning rate for a model of this config."""
        if self.learning_rate != "auto":
            return self.learning_rate
        hidden: int = config.get_text_config().hidden_size
        lora: float = 5e-4 * (2000 / hidden) ** 0.781
        return lora if adapter else lora / 100

    def arguments(self, config: Any) -> dict[str, Any]:
        """Schedule, warm-up, clipping and decay for TrainingArguments."""
        return {
            "lr_scheduler_type": self.schedule,
            "warmup_steps": self.warmup,
            "max_grad_norm": self.clip,
            "weight_decay": self.weight_decay,
        }

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
        """Project onto the ball ||W - W0|| <= cap ||W0||."""
        if self.cap is None:
            return
        displacement = ctx.start.displacement().relative
        if math.isnan(displacement):
            raise RequestError(
                "levers.budget.cap: what is trained starts at zero, so its displacement has no "
                "relative size; leave the cap out, or set levers.adapter.method to lora or none"
            )
        if displacement > self.cap:
            ctx.start.scale(self.cap / displacement)
            memory["capped"] = memory.get("capped", 0) + 1
