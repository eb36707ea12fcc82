"""KL anchor: stay close to the base's distribution on text of the base's kind.

Source: Li & Hoiem 2016 (LwF); on base samples instead of the lesson's tokens: arXiv 2605.26097.
Equation: weight * mean over anchor positions of KL(base || tuned), full vocabulary.
Acts on: loss, and the mixture (self-generated anchor rows, sampled from the base at temperature 1).
Estimator: exact forward KL at each position; positions sampled with the rows.
Cost: one more forward pass over the anchor rows; generating them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from holdfast.data.example import Role
from holdfast.levers import Lever, Memory, Setup, StepState, Term, TokenLosses, shared_sum
from holdfast.section import Section

if TYPE_CHECKING:
    from holdfast.data.mixture import Stream


class SelfGenerated(Section):
    """Anchor rows that the base writes itself, so that no data of the base's kind is needed."""

    fraction: float = Field(default=0.25, ge=0.0, lt=1.0)
    """Share of each step's tokens. 0 turns it off."""
    rows: int | None = Field(default=None, ge=1)
    """Distinct rows to generate; empty: as many as the run reads, at most `max_rows`."""
    max_rows: int = Field(default=2048, ge=1)
    """Ceiling of the automatic number of rows; beyond it rows are read more than once."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Length of a row in tokens; shorter where the model ends or `max_length` cuts."""
    temperature: float = Field(default=1.0, gt=0.0)
    """1 samples the base's own distribution; anything else shifts it."""


class KlAnchor(Lever):
    """A KL term to the base. `kl_anchor: none` (weight 0) turns it off."""

    OFF: ClassVar = {"weight": 0.0}

    weight: float = Field(default=10.0, ge=0.0)
    """Weight of the mean KL (nats a token) beside the lesson's mean loss. 0 turns it off."""
    on: Literal["anchor", "task", "both"] = "anchor"
    """anchor: self-generated rows, and replay rows whose loss is kl. task: the lesson's own
    response tokens, as the classic recipe asks for; it fights the lesson."""
    self_generated: SelfGenerated = SelfGenerated()
    """Anchor rows sampled from the base before training."""
    reference: Literal["auto", "adapter_off", "frozen"] = "auto"
    """auto: the adapter switched off, or a frozen copy for full fine-tuning."""

    def kl_roles(self) -> frozenset[Role]:
        """Anchor positions, lesson positions, or both."""
        if self.weight == 0:
            return frozenset()
        roles = {"anchor": (Role.ANCHOR,), "task": (Role.TASK,), "both": (Role.ANCHOR, Role.TASK)}
        return frozenset(roles[self.on])

    def streams(self, setup: Setup) -> Sequence[Stream]:
        """Sample the self-generated rows (once; they are kept in the run folder)."""
        fraction = self.self_generated.fraction
        if self.weight == 0 or self.on == "task" or fraction == 0:
            return ()
        from holdfast.data.self_generated import generate_stream

        length = min(self.self_generated.max_new_tokens, setup.max_length - 1)
        needed = fraction / (1 - fraction) * setup.lesson_tokens / length
        rows = self.self_generated.rows or max(16, min(round(needed), self.self_generated.max_rows))
        stream = generate_stream(
            setup.model,
            setup.tokenizer,
            name="self_generated",
            share=fraction,
            rows=rows,
            max_new_tokens=length,
            temperature=self.self_generated.temperature,
            seed=setup.seed,
            folder=setup.folder,
        )
        return (stream,)

    def prepare(self, setup: Setup) -> None:
        """Take the base's view: the adapter switched off, or a frozen copy."""
        if self.weight == 0:
            return
        from holdfast.reference.adapter_off import AdapterOff
        from holdfast.reference.frozen import Frozen

        adapter = hasattr(setup.model, "disable_adapter")
        use_adapter = self.reference == "adapter_off" or (self.reference == "auto" and adapter)
        setup.reference = AdapterOff(setup.model) if use_adapter else Frozen(setup.model)

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        """Weight * sum KL / (anchor positions of the whole step)."""
        roles = self.kl_roles()
        if not roles:
            return {}
        return {
            f"kl_anchor/{role.name.lower()}": Term(
                shared_sum(out.kl, out.kl_roles == role), state.totals[role], self.weight
            )
            for role in sorted(roles)
            if state.totals[role]
        }
