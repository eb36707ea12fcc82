"""Optimizer: which rule turns gradients into steps, and decay towards the base.

Sources: AdamW (Loshchilov & Hutter 2019), APOLLO (arXiv 2412.05270), GaLore (2403.03507), Muon
(Jordan 2024; as torch.optim.Muon). The one that the base was pretrained with suits it best
(2605.06654); of none of them is it known that it forgets less.
Equation: decay_to_base d: W <- W - lr d (W - W0) after the step: decoupled, as AdamW's decay, but
towards the start of this stage. Under LoRA W - W0 = s B A shrinks by just that factor.
Acts on: the step.
Cost: that of the optimizer; the decay reads the trained weights once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from holdfast.errors import RequestError, did_you_mean
from holdfast.levers import Lever, Memory, StepContext

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Value = str | int | float | bool


@dataclass(frozen=True)
class _Offered:
    """What an optimizer needs and takes."""

    module: str = "torch"
    package: str = "torch"
    betas: bool = False
    eps: bool = False
    args: tuple[str, ...] = ()
    """As transformers reads them from `optim_args`; all others it would silently drop."""
    low_rank: bool = False


_ADAM = _Offered(betas=True, eps=True)
_BITSANDBYTES = _Offered("bitsandbytes", "bitsandbytes", betas=True, eps=True)
_LION = _Offered("bitsandbytes", "bitsandbytes", betas=True)
_ADEMAMIX = _Offered(
    "bitsandbytes", "bitsandbytes", True, True, args=("beta3", "alpha", "t_alpha", "t_beta3")
)
_TORCHAO = _Offered("torchao", "torchao", True, True, args=("bf16_stochastic_round",))
_PROJECTION = ("rank", "update_proj_gap", "scale", "proj_type")
_GALORE = _Offered("galore_torch", "galore-torch", args=_PROJECTION, low_rank=True)
MUON = "muon"
OFFERED = {
    "adamw_torch": _ADAM,
    "adamw_torch_fused": _ADAM,
    "adamw_torch_4bit": _TORCHAO,
    "adamw_torch_8bit": _TORCHAO,
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), _BITSANDBYTES
    ),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"), _LION),
    **dict.fromkeys(("ademamix", "ademamix_8bit"), _ADEMAMIX),
    "sgd": _Offered(args=("momentum", "dampening", "nesterov")),
    "adagrad": _Offered(args=("lr_decay", "eps")),
    "rmsprop": _Offered(args=("momentum", "alpha", "eps", "centered")),
    "adafactor": _Offered(),
    "stable_adamw": _Offered(
        "optimi", "torch-optimi", True, True, args=("decouple_lr", "max_lr", "kahan_sum")
    ),
    "apollo_adamw": _Offered(
        "apollo_torch", "apollo-torch", True, True, (*_PROJECTION, "proj", "scale_type"), True
    ),
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor"), _GALORE),
    MUON: _Offered(args=("momentum", "nesterov", "ns_steps", "eps")),
}
"""Those of transformers that step when the step is due, and torch's Muon."""
ELSEWHERE = {
    "layerwise": "steps within backward, before a step could be refused or clipped",
    "lomo": "steps within backward, before a step could be refused or clipped",
    "schedule_free": "trains weights that are not the ones to measure and keep",
}
"""Parts of transformers' other names, and what is in the way."""


class Optimizer(Lever):
    """What turns gradients into steps."""

    OFF: ClassVar = {}
    wrap_order: ClassVar = 2

    name: str = "adamw_torch_fused"
    """As transformers' `optim` names it: adamw_torch, sgd, adafactor, adamw_8bit (bitsandbytes),
    apollo_adamw, galore_adamw, ...; or muon, where only matrices between embeddings and head are
    trained."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay of the two moments, each 0 and up, below 1."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""
    args: dict[str, Value] = Field(default_factory=dict)
    """What else the optimizer takes (transformers' `optim_args`), such as rank: 64 for GaLore."""
    target_modules: list[str] | None = None
    """Layers whose gradients GaLore and APOLLO project; empty: all linear ones."""
    decay_to_base: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay towards the start, times the learning rate, at every step; below
    1 / learning rate. 0 turns it off."""

    @field_validator("name")
    @classmethod
    def _offered(cls, value: str) -> str:
        if value in OFFERED:
            return value
        for part, why in ELSEWHERE.items():
            if part in value:
                raise ValueError(f"{why}; give another, such as adamw_torch")
        raise ValueError(f"not an optimizer of transformers; {did_you_mean(value, OFFERED)}")

    @model_validator(mode="after")
    def _takes_what_it_is_given(self) -> Self:
        offered, default = OFFERED[self.name], Optimizer.model_fields
        for field, taken in (
            ("betas", offered.betas),
            ("eps", offered.eps),
            ("target_modules", offered.low_rank),
        ):
            if not taken and getattr(self, field) != default[field].default:
                raise ValueError(f"{self.name} takes no {field}; leave it out")
        unknown = sorted(self.args.keys() - set(offered.args))
        if unknown:
            takes = did_you_mean(unknown[0], offered.args) if offered.args else "leave args out"
            raise ValueError(f"{self.name} takes no args.{unknown[0]}; {takes}")
        return self

    def wrap(self, model: PreTrainedModel) -> PreTrainedModel:
        """Nothing is wrapped: what cannot run is refused here, before anything is computed.

        Raises:
            RequestError: its package is missing, or muon would get what is no hidden matrix.
        """
        offered = OFFERED[self.name]
        if find_spec(offered.module) is None:
            raise RequestError(
                f"levers.optimizer.name: '{self.name}' needs the package {offered.package}; "
                f"`pip install {offered.package}`, or set it to adamw_torch"
            )
        if self.name == MUON:
            _check_matrices(model)
        return model

    def arguments(self, config: Any) -> dict[str, Any]:
        """Name and settings for TrainingArguments."""
        if self.name == MUON:
            return {}
        found: dict[str, Any] = {
            "optim": self.name,
            "adam_beta1": self.betas[0],
            "adam_beta2": self.betas[1],
            "adam_epsilon": self.eps,
        }
        if self.args:
            found["optim_args"] = ",".join(f"{key}={value}" for key, value in self.args.items())
        if OFFERED[self.name].low_rank:
            found["optim_target_modules"] = self.target_modules or "all-linear"
        return found

    def optimizer(self, args: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Muon, at a learning rate that means what AdamW's means; None for transformers' own."""
        if self.name != MUON:
            return None
        import torch

        return torch.optim.Muon, {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "adjust_lr_fn": "match_rms_adamw",
            **self.args,
        }

    def after_step(self, ctx: StepContext, memory: Memory) -> None:
        """Shrink the displacement by learning rate * decay_to_base; nothing on a refused step."""
        if self.decay_to_base == 0 or ctx.refused:
            return
        share = ctx.learning_rate * self.decay_to_base
        if share >= 1:
            raise RequestError(
                f"levers.optimizer.decay_to_base: {self.decay_to_base:g} times the learning rate "
                f"{ctx.learning_rate:g} is all of the way back; a value that works: "
                f"{0.1 / ctx.learning_rate:.3g}"
            )
        ctx.start.scale(1 - share)


def _check_matrices(model: Any) -> None:
    import torch

    if not hasattr(torch.optim, "Muon"):
        raise RequestError(
            "levers.optimizer.name: 'muon' needs torch 2.9 or later; update it, or set the name to "
            "adamw_torch"
        )
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside = {id(p) for end in ends if end is not None for p in end.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.ndim != 2 or id(parameter) in outside):
            raise RequestError(
                f"levers.optimizer.name: 'muon' is for matrices between embeddings and head, and "
                f"'{name}' is none; set levers.freeze.presets to [embeddings, head, norms], train "
                "an adapter, or take adamw_torch"
            )
