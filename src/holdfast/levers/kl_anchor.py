"""KL anchor: stay close to the base's distribution on text of the base's kind.

Source: Li & Hoiem 2016 (LwF); on base samples instead of the lesson's tokens: arXiv 2605.26097.
Equation: weight * mean over anchor positions of D(base, tuned), full vocabulary; D is forward KL
unless `divergence` says otherwise.
Acts on: loss, and the mixture (self-generated anchor rows, sampled from the base at temperature 1).
Estimator: exact at each position (a cache: on what it lists and on the rest as a whole; within the
rest without bias, from the tokens it drew); positions sampled with the rows. With `share` q below 1
a step or a row has its KL with probability q, and it then counts 1 / q: the expected gradient is
the same, its variance is not.
Cost: generating the anchor rows once, and one more forward pass over each, or one whenever a row
comes by (times `share`), or reading a cache. The base is the start of this stage: reference/ has a
file for each place it comes from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from holdfast.data.example import Role
from holdfast.divergence import Divergence
from holdfast.errors import RequestError, did_you_mean
from holdfast.levers import Lever, Memory, Setup, StepState, Term, TokenLosses, shared_sum
from holdfast.section import Section

if TYPE_CHECKING:
    import torch

    from holdfast.data.mixture import Stream
    from holdfast.reference import Reference

Source = Literal["remembered", "adapter_off", "frozen", "cache", "stage"]
WORDS = ("auto", "remembered", "adapter_off", "frozen", "cache")
ROWS = "self_generated"
STEPS_A_UNIT = 75
LEAST, MOST = 1.0, 20.0
"""The automatic weight: the run's steps / STEPS_A_UNIT, times the base's loss on text of its own
kind in nats a token, within bounds. A heavier anchor keeps more and slows the lesson, so a run can
afford the more of it the longer it is; and a lesson that cannot be known by heart pulls to the last
step, by about as much as it leaves unknown (docs/defaults.md)."""
ROOM = 0.25
"""Part of the free memory that the base's remembered states may take."""
COIN = 0xA5C0
"""Sets this lever's draws apart from others of the same seed."""


class SelfGenerated(Section):
    """Anchor rows that the base writes itself, so that no data of the base's kind is needed."""

    fraction: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Share of each step's tokens. 0 turns it off."""
    rows: int | None = Field(default=None, ge=1)
    """Distinct rows to generate; empty: as many as the run would read if each were of full length,
    at most `max_rows`; shorter ones are read more than once."""
    max_rows: int = Field(default=2048, ge=1)
    """Ceiling of the automatic number of rows; beyond it rows are read more than once."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Length of a row in tokens; shorter where the model ends or `max_length` cuts."""
    temperature: float = Field(default=1.0, gt=0.0)
    """1 samples the base's own distribution; anything else shifts it."""
    engine: Literal["auto", "holdfast", "vllm"] = "auto"
    """What samples. auto: vLLM on CUDA, where it is installed and agrees with the model."""


class KlAnchor(Lever):
    """A KL term to the base. `kl_anchor: none` (weight 0) turns it off."""

    OFF: ClassVar = {"weight": 0.0}

    weight: Annotated[float, Field(ge=0.0)] | Literal["auto"] = "auto"
    """Weight of the mean KL (nats a token) beside the lesson's mean loss. auto: a 75th of the run's
    steps, times the base's loss on the canary (nats a token), from 1 to 20. 0 turns it off."""
    task_weight: float | None = Field(default=None, gt=0.0)
    """Weight on the lesson's positions where `on` is both; empty: `weight`."""
    on: Literal["anchor", "task", "both"] = "anchor"
    """anchor: self-generated rows, and replay rows whose loss is kl. task: the lesson's own
    response tokens, as the classic recipe asks for; it fights the lesson."""
    share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Part of the steps or rows that have their KL, a random choice of (seed, step); the weight is
    divided by it. 1: all."""
    share_of: Literal["steps", "rows"] = "steps"
    """What `share` chooses. steps: the others pass neither anchor rows nor the base. rows: packed
    rows of a micro-batch, one by one: less saved where a step has few, but steps are alike."""
    divergence: Divergence = Divergence()
    """How the distance from the base is measured."""
    self_generated: SelfGenerated = SelfGenerated()
    """Anchor rows sampled from the base before training."""
    reference: str = "auto"
    """Where the base's probabilities come from. remembered: its last hidden states at every text of
    the run, taken once before the first step. adapter_off: the model with this stage's adapter off.
    frozen: a second copy. cache: see `cache`. A path: another stage (the folder of a run, a model
    or an adapter), loaded frozen. auto: the cache if one is given, else remembered; where that
    cannot be, adapter_off if an adapter is trained, else frozen."""
    reference_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """What a second copy is held in. auto: bfloat16 on an accelerator, else as the model. int8: a
    byte a weight of the layers' matrices; its rounding is then part of the divergence."""
    reference_device: str | None = None
    """Where a second copy lies and runs, such as cpu or cuda:1; offload: it lies on the CPU and
    each layer is brought over when it is used. Empty: beside the model."""
    cache: str | None = None
    """A folder written by `holdfast cache build`: no second model and no second pass."""

    @field_validator("reference")
    @classmethod
    def _word_or_path(cls, value: str) -> str:
        looks_like_path = "/" in value or value.startswith((".", "~"))
        if value in WORDS or looks_like_path or Path(value).exists():
            return value
        raise ValueError(f"neither a word nor the folder of a stage; {did_you_mean(value, WORDS)}")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.reference == "cache" and self.cache is None:
            raise ValueError("reference 'cache' needs cache: the folder that was built")
        if self.cache is not None and self.reference not in ("auto", "cache"):
            raise ValueError(
                f"cache is given but reference is '{self.reference}'; give one of them"
            )
        if self._copied_as and (self.cache or self.reference in ("adapter_off", "remembered")):
            raise ValueError(f"{self._copied_as} is for a second copy; give reference: frozen")
        if self.task_weight is not None and self.on != "both":
            raise ValueError(f"task_weight is for on: both, not {self.on}; give weight")
        return self

    @property
    def _copied_as(self) -> str:
        """The setting that only a second copy has a use for, if one is given."""
        if self.reference_dtype != "auto":
            return "reference_dtype"
        return "reference_device" if self.reference_device is not None else ""

    @property
    def anchored(self) -> bool:
        """Whether anchor rows are held to the base's outputs."""
        return self.weight != 0 and self.on != "task"

    def source(self, adapter: bool) -> tuple[Source, str]:
        """Where the base's probabilities come from, and why, when an adapter is trained or not."""
        if self.cache is not None:
            return "cache", "a cache is given"
        if self.reference in ("remembered", "adapter_off", "frozen"):
            return self.reference, "asked for"  # type: ignore[return-value]
        if self.reference != "auto":
            return "stage", f"{self.reference} is asked for"
        if self._copied_as:
            return "frozen", f"{self._copied_as} asks for a second copy"
        if self.share == 1:
            return "remembered", "the texts are known"
        return self._live(adapter)

    def _live(self, adapter: bool) -> tuple[Source, str]:
        """A base that is asked anew at every step, and why this one."""
        if adapter:
            return "adapter_off", "an adapter is trained"
        return "frozen", "all weights are trained"

    def kl_roles(self) -> frozenset[Role]:
        """Anchor positions, lesson positions, or both."""
        if self.weight == 0:
            return frozenset()
        roles = {"anchor": (Role.ANCHOR,), "task": (Role.TASK,), "both": (Role.ANCHOR, Role.TASK)}
        return frozenset(roles[self.on])

    def streams(self, setup: Setup) -> Sequence[Stream]:
        """Sample the self-generated rows (once; they are kept in the run folder).

        A cache is opened here, before the base is wrapped: it knows the base by its weights.
        """
        fraction = self.self_generated.fraction
        if self.weight and self.cache is not None:
            from holdfast.reference.cache import Cached, Identity

            identity = Identity.of(setup.model, setup.tokenizer, self.divergence.temperature)
            setup.reference = Cached.open(Path(self.cache), identity)
        if not self.anchored or fraction == 0:
            return ()
        from holdfast.data.self_generated import generate_stream

        length = min(self.self_generated.max_new_tokens, setup.max_length - 1)
        needed = fraction / (1 - fraction) * setup.lesson_tokens / length
        rows = self.self_generated.rows or max(16, min(round(needed), self.self_generated.max_rows))
        stream = generate_stream(
            setup.model,
            setup.tokenizer,
            name=ROWS,
            share=fraction,
            rows=rows,
            max_new_tokens=length,
            temperature=self.self_generated.temperature,
            seed=setup.seed,
            folder=setup.folder,
            kept=() if self.cache is None else (Path(self.cache) / "data",),
            engine=self.self_generated.engine,
            notes=setup.notes,
        )
        return (stream,)

    def prepare(self, setup: Setup) -> None:
        """Take the base's view; see `reference`."""
        if self.weight == 0:
            return
        adapter = hasattr(setup.model, "disable_adapter")
        source, why = self.source(adapter)
        if source == "remembered":
            setup.reference, missing = self._remembered(setup)
            if missing and self.reference == "remembered":
                raise RequestError(
                    f"levers.kl_anchor.reference: 'remembered' cannot be: {missing}; leave it at "
                    "auto"
                )
            if missing:
                source, why = self._live(adapter)
                why = f"{why} ({missing})"
        if source == "adapter_off":
            from holdfast.reference.adapter_off import AdapterOff

            try:
                setup.reference = AdapterOff(setup.model)
            except ValueError as error:
                if self.reference == "adapter_off":
                    raise RequestError(
                        f"levers.kl_anchor.reference: 'adapter_off' is not the base: {error}; set "
                        "it to frozen"
                    ) from error
                source, why = "frozen", str(error)
        if source in ("frozen", "stage"):
            setup.reference = self._second(source, setup)
        setup.notes["reference"] = f"{source}: {why}"

    def _remembered(self, setup: Setup) -> tuple[Reference | None, str]:
        """The model as it stands, before the first step; or what it takes that is not there."""
        from holdfast.reference.frozen import free_memory
        from holdfast.reference.remembered import Remembered, size

        if setup.texts is None:
            return None, "the texts of the run are not known beforehand"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return None, "several processes train"
        import torch

        texts = list(setup.texts(self.kl_roles()))
        needed = size(setup.model, sum(map(len, texts)))
        free = free_memory(torch.device("cpu"))
        if needed > ROOM * free:
            return None, (
                f"the base's hidden states are {needed / 2**30:.1f} GiB, and a quarter of the "
                f"{free / 2**30:.1f} GiB of free memory is what they may take"
            )
        return Remembered.of(setup.model, texts), ""

    def _second(self, source: Source, setup: Setup) -> Reference:
        """A second model."""
        from holdfast.reference.frozen import Frozen, check_room
        from holdfast.reference.stage import stage

        held: dict[str, Any] = {"dtype": self.reference_dtype, "device": self.reference_device}
        if source == "stage":
            return stage(self.reference, setup.tokenizer, setup.model, **held)
        if self.reference == "auto":
            check_room(setup.model, **held)
        return Frozen.copy_of(setup.model, **held)

    def kl_rows(self, input_ids_BW: torch.Tensor, state: StepState) -> torch.Tensor | None:
        """The rows (B,) whose KL is taken in this step, by coins that know only seed, step and row.

        A row is known by its tokens, packed as they are.
        """
        if self.share == 1:
            return None
        import torch

        if self.share_of == "steps":
            kept = [self._taken(state)] * len(input_ids_BW)
        else:
            rows = input_ids_BW.cpu().numpy()
            digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
            kept = [self._taken(state, int.from_bytes(digest, "big")) for digest in digests]
        return torch.tensor(kept, device=input_ids_BW.device)

    def strength(self, steps: int, base_loss: float = 0.0) -> float:
        """The weight in a run of so many optimizer steps.

        Args:
            base_loss: of the base on text of its own kind, nats a token.
        """
        if self.weight != "auto":
            return self.weight
        return min(max(steps / STEPS_A_UNIT * base_loss, LEAST), MOST)

    def _taken(self, state: StepState, *row: int) -> bool:
        """The coin of a step, or of a row in it: true with probability `share`."""
        import numpy as np

        random = np.random.default_rng(np.random.SeedSequence([state.seed, COIN, state.step, *row]))
        return bool(random.random() < self.share)

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        """Weight * sum of the divergence / share / (anchor positions of the whole step).

        There is none in a step that is left out.
        """
        if self.share < 1 and self.share_of == "steps" and not self._taken(state):
            return {}
        weights = dict.fromkeys(self.kl_roles(), self.strength(state.steps, state.base_loss))
        if self.task_weight is not None and weights:
            weights[Role.TASK] = self.task_weight
        return {
            f"kl_anchor/{role.name.lower()}": Term(
                shared_sum(out.kl, out.kl_roles == role) / self.share,
                state.totals[role],
                weights[role],
            )
            for role in sorted(weights)
            if state.totals[role]
        }
