"""Adapter: train a small part that can be switched off, in peft's format.

Source: Hu et al. 2021 (LoRA): W' = W + s B A, s = alpha / r.  Acts on: the trainable part.
Default: LoRA on the MLP only, which forgets least at equal learning in peft's method comparison
(Llama-3.2-3B, MetaMathQA: MLP-only r10 .494 / .032 accuracy / forgetting, q,v r32 .478 / .050).
Cost: r (d_in + d_out) weights a matrix; the base itself is never touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from holdfast.errors import RequestError, did_you_mean
from holdfast.levers import Lever

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK = 16
"""LoRA's rank where none is given."""
MLP_BLOCK = re.compile(
    r"(^|[._])(mlp|mlps|feed_forward|ffn|fc|moe|experts?|block_sparse_moe)([._]|$)"
)
MLP_FLAT = re.compile(r"(^|\.)(fc1|fc2|fc_in|fc_out|wi|wo|w1|w2|w3)$")
ATTENTION_BLOCK = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention)([._]|$)")
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")


class Adapter(Lever):
    """Which small part is trained instead of the model."""

    OFF: ClassVar = {"method": "none"}

    method: str = "lora"
    """none for full fine-tuning, or a peft method: lora, oft, ... (any name in peft.PeftType)."""
    target: Literal["mlp", "attention", "all-linear"] | list[str] = "mlp"
    """Matrices that get an adapter: a preset (never a router), or module names as peft takes
    them."""
    r: int | None = Field(default=None, ge=1, le=4096)
    """Rank, 1 and up; 8-64 is usual. Empty: 16 for LoRA, the method's own for any other."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha; empty: 2 r."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input. 0 turns it off."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Any further field of the method's peft config, such as use_rslora: true, or, for a method
    other than LoRA, all of its fields."""

    @property
    def off(self) -> bool:
        """True for full fine-tuning."""
        return self.method.lower() == "none"

    def wrap(self, model: PreTrainedModel) -> PreTrainedModel:
        """Add the adapter. Raises RequestError when peft does not take the settings."""
        if self.off:
            return model.requires_grad_(True)
        from peft import get_peft_model

        config = self._peft_config(model)
        try:
            wrapped = get_peft_model(model, config)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise RequestError(f"levers.adapter: peft refuses these settings: {error}") from error
        if not any(p.requires_grad for p in wrapped.parameters()):
            raise RequestError("levers.adapter: nothing is left to train; widen adapter.target")
        return wrapped

    def _peft_config(self, model: PreTrainedModel) -> Any:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = {str(k.value).lower(): cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        name = self.method.lower()
        if name not in known:
            raise RequestError(
                f"levers.adapter.method: '{self.method}' is not a peft method; "
                f"{did_you_mean(name, [*known, 'none'])}"
            )
        fields: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        accepted = known[name].__dataclass_fields__
        if name == "lora":
            r = self.r or RANK
            fields |= {"r": r, "lora_alpha": self.alpha or 2 * r, "lora_dropout": self.dropout}
        elif "r" in accepted and self.r:
            fields["r"] = self.r
        if "target_modules" in accepted:
            fields |= self._targets(model, "target_parameters" in accepted)
        unknown = set(self.config) - set(accepted)
        if unknown:
            first = sorted(unknown)[0]
            raise RequestError(
                f"levers.adapter.config.{first}: not a field of {known[name].__name__}; "
                f"{did_you_mean(first, accepted)}"
            )
        try:
            config = known[name](**fields | self.config)
        except (TypeError, ValueError) as error:
            raise RequestError(f"levers.adapter.config: peft refuses it: {error}") from error
        if config.is_prompt_learning:
            raise RequestError(
                f"levers.adapter.method: '{self.method}' puts tokens of its own before each row, "
                "which packed rows have no place for; take one that adapts matrices, such as lora"
            )
        return config

    def _targets(self, model: PreTrainedModel, parameters_too: bool) -> dict[str, Any]:
        """Module names for peft, and, for experts fused into 3-D parameters, parameter names."""
        if isinstance(self.target, list):
            return {"target_modules": self.target}
        import torch

        chosen = PRESETS[self.target]
        head = model.get_output_embeddings()
        modules = [
            name
            for name, module in model.named_modules()
            if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
            and module is not head
            and not ROUTER.search(name)
            and chosen(name)
        ]
        fused = [
            name
            for name, parameter in model.named_parameters()
            if parameters_too and parameter.ndim == 3 and _in_mlp(name) and chosen(name)
        ]
        if not modules and not fused:
            raise RequestError(
                f"levers.adapter.target: no {self.target} matrices found in "
                f"{type(model).__name__}; give module names, such as [up_proj, down_proj], or "
                "all-linear"
            )
        return {"target_modules": modules} | ({"target_parameters": fused} if fused else {})


def _in_mlp(name: str) -> bool:
    outside_attention = not ATTENTION_BLOCK.search(name)
    return outside_attention and bool(MLP_BLOCK.search(name) or MLP_FLAT.search(name))


PRESETS: dict[str, Callable[[str], object]] = {
    "mlp": _in_mlp,
    "attention": ATTENTION_BLOCK.search,
    "all-linear": lambda _name: True,
}
"""Whether a preset takes the matrix of this name."""
