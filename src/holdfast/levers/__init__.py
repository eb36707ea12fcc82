"""Levers: what keeps a model's abilities while it learns. One file each, found by its file name.

A lever is a frozen recipe section that overrides the hooks it needs, in path order:

    arguments    before training     entries for transformers.TrainingArguments
    wrap         before training     the model with its trainable part restricted
    streams      before training     extra streams for the mixture
    prepare      before training     what it must know of the start (reference, weights)
    kl_roles     before training     tokens that need the divergence from the base
    terms        every micro-batch   {name: Term}, added to the loss by the step, never by the lever
    before_step  gradients ready     may refuse the step
    after_step   weights moved       may move them back (a cap)
    after_probe  meters read         may change its own strength, or stop

Its settings never change. What a lever must remember between steps lives in the `memory` dict it
is handed (plain JSON values), which is saved with each checkpoint, so resuming is exact.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from holdfast.data.example import Role
from holdfast.section import Section

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from holdfast.data.mixture import Stream
    from holdfast.meters import Reading
    from holdfast.meters.drift import Start
    from holdfast.reference import Reference

Memory = dict[str, Any]


@dataclass(frozen=True)
class Term:
    """One part of the loss. The step adds ``weight * sum / count`` and nothing else."""

    sum: torch.Tensor
    """Scalar, summed over the tokens of this micro-batch."""
    count: float
    """What the sum over the *whole step* is divided by: all its micro-batches, on all devices."""
    weight: float


@dataclass
class Setup:
    """What a lever may know before training starts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    """The run's `data/` folder: tokenized rows and generated text are kept there."""
    seed: int
    max_length: int
    lesson_tokens: int = 0
    """Tokens of lesson text a whole run will read, epochs counted."""
    reference: Reference | None = None
    """Where the base's hidden states come from; set by the lever that needs them."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Facts for the report, by lever."""


@dataclass(frozen=True)
class TokenLosses:
    """Per-token losses of one micro-batch, only where somebody asked for them.

    `nll` (N,) belongs to positions with role TASK or REPLAY, `kl` (M,) to positions whose role is
    in the union of the levers' `kl_roles`; `*_roles` are the Role of each position.
    """

    nll: torch.Tensor
    nll_roles: torch.Tensor
    kl: torch.Tensor
    kl_roles: torch.Tensor


@dataclass(frozen=True)
class StepState:
    """Where training stands when `terms` is called."""

    step: int
    totals: Mapping[Role, int]
    """Positions of each role in this optimizer step, over all micro-batches and devices."""
    micro_batches: int
    """Micro-batches of this optimizer step over all devices: the count of a weight penalty."""


@dataclass
class StepContext:
    """The step as `before_step` and `after_step` see it."""

    model: PreTrainedModel
    step: int
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    start: Start
    """The weights training began with."""
    refused: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Drop this step: the optimizer sees no gradient and changes nothing."""
        self.refused.append(reason)


@dataclass
class ProbeContext:
    """What `after_probe` may do."""

    step: int
    stop: str | None = None
    """Set to a reason to end training after this step."""


class Lever(Section):
    """Base of every lever: each hook does nothing until a lever overrides it."""

    key: ClassVar[str] = ""
    """The file name, which is also the key in the recipe."""
    OFF: ClassVar[Mapping[str, Any]] = {}
    """The settings that turn the lever off: what `none` in a recipe means."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.key = cls.__module__.rpartition(".")[2]

    def arguments(self, config: Any) -> dict[str, Any]:
        """Entries for `transformers.TrainingArguments`, given the model's config."""
        return {}

    def wrap(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model with its trainable part restricted."""
        return model

    def streams(self, setup: Setup) -> Sequence[Stream]:
        """Return extra streams; their shares are taken from the lesson's share of tokens."""
        return ()

    def prepare(self, setup: Setup) -> None:
        """Learn what must be known of the start."""

    def kl_roles(self) -> frozenset[Role]:
        """Roles of the positions that need KL to the base."""
        return frozenset()

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        """Return this lever's part of the loss."""
        return {}

    def before_step(self, ctx: StepContext, memory: Memory) -> None:
        """Look at the gradients; may refuse the step."""

    def after_step(self, ctx: StepContext, memory: Memory) -> None:
        """Look at the weights after the step; may move them back."""

    def after_probe(self, readings: Sequence[Reading], ctx: ProbeContext, memory: Memory) -> None:
        """Look at the meters; may change own strength through `memory`, or stop."""


@cache
def levers() -> dict[str, type[Lever]]:
    """Every lever by its key, which is the name of its file in this folder."""
    found: dict[str, type[Lever]] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        namespace = vars(import_module(f"{__name__}.{module.name}"))
        (lever,) = [
            value
            for value in namespace.values()
            if isinstance(value, type)
            and issubclass(value, Lever)
            and value.__module__ == f"{__name__}.{module.name}"
        ]
        found[module.name] = lever
    return found


def shared_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the masked values that stays attached to the graph even when the mask is empty."""
    return (values * mask).sum()
