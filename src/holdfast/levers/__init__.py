"""Levers: what keeps a model's abilities while it learns. One file each, found by its file name.

A lever is a frozen recipe section that overrides the hooks it needs, in path order:

    arguments    before training     entries for transformers.TrainingArguments
    optimizer    before training     an optimizer class that transformers does not offer
    wrap         before training     the model with its trainable part restricted
    streams      before training     extra streams for the mixture
    lesson       before training     the lesson as several streams
    prepare      before training     what it must know of the start (reference, weights)
    kl_roles     before training     tokens that need the divergence from the base
    entropy_over before training     tokens of the lesson's distribution whose entropy it needs
    kl_rows      every micro-batch   rows of it that need it in this step
    hidden       every micro-batch   the last hidden states, computed in another way
    token_weights every micro-batch  what each token of the lesson counts in the lesson's own term
    terms        every micro-batch   {name: Term}, added to the loss by the step, never by the lever
    before_step  gradients ready     may refuse the step
    after_step   weights moved       may move them back (a cap)
    after_probe  meters read         may change its own strength, or stop
    strengths    every step          what the levers' terms, the lesson's share of the tokens and
                                     the step size are multiplied by

Its settings never change. What a lever must remember between steps lives in the `memory` dict it
is handed (plain JSON values), which is saved with each checkpoint, so resuming is exact.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from holdfast.data.example import Example, Role
from holdfast.dual import Strengths
from holdfast.errors import RequestError
from holdfast.section import Section

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
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
    lesson: Sequence[Stream] = ()
    """The lesson's streams, once `prepare` is called."""
    texts: Callable[[Collection[Role]], Iterable[Sequence[int]]] | None = None
    """Token ids of every text that the base is asked about where rows of these roles are anchored,
    by the steps and by the meters after them; None where that is not known beforehand."""
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
    batch: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The `MicroBatch` that they belong to."""
    entropy: torch.Tensor | None = None
    """(N,) entropy over the likeliest tokens, where a lever asked for it; without gradient."""


@dataclass(frozen=True)
class StepState:
    """Where training stands when `terms` is called."""

    step: int
    totals: Mapping[Role, int]
    """Positions of each role in this optimizer step, over all micro-batches and devices."""
    micro_batches: int
    """Micro-batches of this optimizer step over all devices: the count of a weight penalty."""
    seed: int = 0
    """The run's; what is drawn in a step is drawn from (seed, step)."""
    steps: int = 0
    """Optimizer steps of the whole run."""
    base_loss: float = 0.0
    """Mean loss of the base on its canary, nats a token; 0 where none was read."""


@dataclass
class StepContext:
    """The step as `before_step` and `after_step` see it."""

    model: PreTrainedModel
    step: int
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    start: Start
    """The weights training began with."""
    learning_rate: float = 0.0
    """Of this step."""
    refused: list[str] = field(default_factory=list)
    """Reasons; a step with one changes nothing."""

    def refuse(self, reason: str) -> None:
        """Drop this step: the optimizer sees no gradient and changes nothing."""
        self.refused.append(reason)


@dataclass
class ProbeContext:
    """What `after_probe` may do."""

    step: int
    stop: str | None = None
    """Set to a reason to end training after this step."""
    before: Sequence[Reading] = ()
    """The base's readings, with their items."""
    to_fall: float = 0.0
    """What the schedule's learning rate has still to fall, as part of its peak."""
    to_come: float = 1.0
    """Steps still to come, as part of the run's."""
    held: bool = False
    """Whether this step's loss had a term beside the lesson's."""
    drawn_back: float = 1.0
    """Multiplied by the part of the way from their start that a lever leaves the weights on."""
    noted: list[tuple[str, str, float]] = field(default_factory=list)
    """Values that a lever wants kept as readings of training: meter, name, value."""

    def note(self, meter: str, name: str, value: float) -> None:
        """Keep a value as a reading of training."""
        self.noted.append((meter, name, value))


class Lever(Section):
    """Base of every lever: each hook does nothing until a lever overrides it."""

    key: ClassVar[str] = ""
    """The file name, which is also the key in the recipe."""
    wrap_order: ClassVar[int] = 0
    """Levers wrap the model from the lowest up: what freezes, what adapts, what looks at both."""
    OFF: ClassVar[Mapping[str, Any]] = {}
    """The settings that turn the lever off: what `none` in a recipe means."""
    reads_losses: ClassVar[bool] = True
    """Whether `terms` looks at the token losses. False (a penalty on weights) spares it being asked
    before each forward pass what they will weigh."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.key = cls.__module__.rpartition(".")[2]

    def arguments(self, config: Any) -> dict[str, Any]:
        """Entries for `transformers.TrainingArguments`, given the model's config."""
        return {}

    def optimizer(self, args: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Return an optimizer that transformers does not offer, and its settings, if it is one."""
        return None

    def wrap(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model with its trainable part restricted."""
        return model

    def streams(self, setup: Setup) -> Sequence[Stream]:
        """Return extra streams; their shares are taken from the lesson's share of tokens."""
        return ()

    def lesson(self, rows: Sequence[Example] | Dataset, share: float) -> Sequence[Stream]:
        """Return the lesson's rows as streams whose shares sum to `share`; none: it is one."""
        return ()

    def prepare(self, setup: Setup) -> None:
        """Learn what must be known of the start."""

    def kl_roles(self) -> frozenset[Role]:
        """Roles of the positions that need KL to the base."""
        return frozenset()

    def kl_rows(self, input_ids_BW: torch.Tensor, state: StepState) -> torch.Tensor | None:
        """Rows (B,) of a micro-batch whose `kl_roles` count in this step; None: all of them."""
        return None

    def hidden(self, model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return the last hidden states (B, W, H) at every position with a role; None: plainly."""
        return None

    def entropy_over(self) -> int:
        """How many of the likeliest tokens `TokenLosses.entropy` is taken over; 0: not needed."""
        return 0

    def token_weights(
        self, out: TokenLosses, state: StepState, memory: Memory
    ) -> torch.Tensor | None:
        """Return a weight (N,) for each NLL, without gradient; None: 1.

        The lesson's own term is sum weight * nll / (the lesson's tokens in the whole step): a lever
        that divides by something else has it in its weights. Other terms are not weighed.
        """
        return None

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        """Return this lever's part of the loss."""
        return {}

    def before_step(self, ctx: StepContext, memory: Memory) -> None:
        """Look at the gradients; may refuse the step."""

    def after_step(self, ctx: StepContext, memory: Memory) -> None:
        """Look at the weights after the step; may move them back."""

    def after_probe(self, readings: Sequence[Reading], ctx: ProbeContext, memory: Memory) -> None:
        """Look at the meters; may change own strength through `memory`, or stop."""

    def strengths(self, memory: Memory) -> Strengths:
        """What others are multiplied by, from this step on; it changes in `after_probe` only."""
        return Strengths()


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


def wrapped(levers: Sequence[Lever], model: PreTrainedModel) -> PreTrainedModel:
    """The model as every lever wraps it.

    Raises:
        RequestError: nothing is left to train.
    """
    for lever in sorted(levers, key=lambda lever: lever.wrap_order):
        model = lever.wrap(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise RequestError(
            "levers.freeze: nothing is left to train; freeze less, or widen levers.adapter.target"
        )
    return model


def combined(levers: Sequence[Lever], memory: Mapping[str, Memory]) -> Strengths:
    """The product of what every lever multiplies others by."""
    product = Strengths()
    for lever in levers:
        product = product * lever.strengths(memory[lever.key])
    return product


def shared_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the masked values that stays attached to the graph even when the mask is empty."""
    return (values * mask).sum()
