"""Adapter: train a small part that can be switched off, in peft's format.

Sources: Hu et al. 2021 (LoRA): W' = W + s B A, s = alpha / r; rsLoRA 2312.03732: alpha / sqrt(r);
DoRA 2402.09353; OFT 2306.07280; OSF 2504.07097: the leading singular directions of W stay; CorDA
2406.05223 in its knowledge-preserving mode: A and B begin as the directions of W that text of the
base's kind uses least, and W less them stays; QLoRA 2305.14314: W in 4 bits.
Acts on: the trainable part.
Default: LoRA on the MLP only, which forgets least at equal learning in peft's method comparison
(Llama-3.2-3B, MetaMathQA: MLP-only r10 .494 / .032 accuracy / forgetting, q,v r32 .478 / .050).
Cost: r (d_in + d_out) weights a matrix; the base itself is never touched. CorDA: writing its rows
and a singular value decomposition of each matrix, once.

An initialisation that moves part of W into B A (CorDA, PiSSA, OLoRA) leaves a base that is not the
base when the adapter is off: the reference is then a copy, and what is saved is B A - B0 A0, of
rank 2 r, which loads on the original base. In bfloat16 W less B0 A0 is rounded, and with it the
start.

A penalty on ||s B A||_F is the lever `l2_sp`: under an adapter it acts on the product.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from holdfast.errors import RequestError, did_you_mean
from holdfast.levers import Lever, Setup
from holdfast.levers.freeze import ROUTER

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from holdfast.data.example import Example
    from holdfast.data.mixture import Stream

SMALL = 50_000_000
"""Parameters below which `auto` trains all of them: with the anchor, two models of 4 million
learned more that way and forgot no more (docs/levers.md); so few cost less than 1 GiB to train."""
RANK = 16
"""LoRA's rank where none is given."""
RECIPES: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "corda": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "qlora": {},
}
"""LoRA by other names, and what they set in peft's LoraConfig."""
MOVES_BASE = ("corda", "pissa", "olora")
"""Beginnings of `init_lora_weights` that move a part of W into B A."""
NEEDS_MORE = ("eva", "loftq", "lora_ga")
"""Initialisations that peft leaves to a call of their own, which is not made here."""
AWAY = 1e-2
"""Change of a logit beside the largest, by which an adapter begins elsewhere than at the base."""
SEED_OFFSET = 3_000_017
"""CorDA's rows are sampled with another seed than anchor rows, canary text and EWC's."""
MLP_BLOCK = re.compile(
    r"(^|[._])(mlp|mlps|feed_forward|ffn|fc|moe|experts?|block_sparse_moe)([._]|$)"
)
MLP_FLAT = re.compile(r"(^|\.)(fc1|fc2|fc_in|fc_out|wi|wo|w1|w2|w3)$")
ATTENTION_BLOCK = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention)([._]|$)")


class Adapter(Lever):
    """Which small part is trained instead of the model."""

    OFF: ClassVar = {"method": "none"}
    wrap_order: ClassVar = 1

    method: str = "auto"
    """none for full fine-tuning; lora, rslora, dora, corda, qlora; or another method of peft's,
    such as oft, osf or loha (any name in peft.PeftType). auto: lora, but none for a model under 50
    million parameters, where an adapter saves nothing; lora there too if another field of this
    section is given."""
    target: Literal["mlp", "attention", "all-linear"] | list[str] = "mlp"
    """Matrices that get an adapter: a preset (never a router), or module names as peft takes
    them. What `freeze` holds gets none."""
    r: int | None = Field(default=None, ge=1, le=4096)
    """Rank, 1 and up; 8-64 is usual. Empty: 16 for LoRA, the method's own for any other."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha; empty: 2 r."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input. 0 turns it off."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Any further field of the method's peft config, such as effective_rank: 0.75 for OSF, which
    is the share of singular directions that stay frozen."""
    covariance_rows: int = Field(default=256, ge=1)
    """Rows that the base writes for CorDA, to see which directions its own text uses."""
    _rows: list[Example] = PrivateAttr(default_factory=list)
    _start: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    def settled(self, parameters: int) -> Adapter:
        """`auto` replaced by what it means for a model of so many parameters."""
        if self.method.lower() != "auto":
            return self
        small = parameters < SMALL and self.model_fields_set <= {"method"}
        return self.model_copy(update={"method": "none" if small else "lora"})

    @property
    def off(self) -> bool:
        """True for full fine-tuning."""
        return self.method.lower() == "none"

    @property
    def four_bit(self) -> bool:
        """Whether the base is to be loaded in 4 bits."""
        return self.method.lower() == "qlora"

    @property
    def _init(self) -> str:
        """How LoRA's weights begin, in lower case; "true" is B = 0."""
        given = RECIPES.get(self.method.lower(), {}) | self.config
        return str(given.get("init_lora_weights", True)).lower()

    def streams(self, setup: Setup) -> Sequence[Stream]:
        """Let the base write CorDA's rows while it is bare; they are no stream, for they are not
        trained.
        """
        if self.off or self._init != "corda" or setup.model.device.type == "meta":
            return ()
        from holdfast.data.self_generated import generate

        self._rows = generate(
            setup.model,
            setup.tokenizer,
            rows=self.covariance_rows,
            max_new_tokens=min(256, setup.max_length - 1),
            temperature=1.0,
            seed=setup.seed + SEED_OFFSET,
            keep=setup.folder / "covariance_rows.json",
        )
        return ()

    def wrap(self, model: PreTrainedModel) -> PreTrainedModel:
        """Add the adapter; on the meta device, where nothing can be decomposed, it begins at B = 0.

        Raises:
            RequestError: peft does not take the settings, or the adapter begins away from the base
                without having been asked to.
            NotImplementedError: the method looks at the weights, and there are none.
        """
        if self.method.lower() == "auto":
            return self.settled(model.num_parameters()).wrap(model)
        if self.off:
            return model
        from peft import get_peft_model, get_peft_model_state_dict

        if self.four_bit:
            check_four_bit()
        config, bare = self._peft_config(model), model.device.type == "meta"
        moves_base = self._init.startswith(MOVES_BASE)
        if moves_base and bare:
            config.init_lora_weights, config.corda_config = True, None
        try:
            plain = config.peft_type == "LORA" and not moves_base  # B = 0, or as it was asked
            before = None if bare or plain else _logits(model)
            if config.peft_type == "LORA" and config.init_lora_weights == "corda":
                from peft.tuners.lora.corda import preprocess_corda

                preprocess_corda(model, config, run_model=lambda: self._read(model))
            wrapped = get_peft_model(model, config)
            moved = before is not None and (_logits(wrapped) - before).abs().max()
        except (TypeError, ValueError, NotImplementedError) as error:
            if bare and "meta tensor" in str(error):
                raise
            raise RequestError(f"levers.adapter: peft refuses these settings: {error}") from error
        asked = any(field.startswith("init") for field in self.config)
        if before is not None and moved > AWAY * before.abs().max() and not asked:
            raise RequestError(
                f"levers.adapter.method: '{self.method}' begins away from the base; set the field "
                "of levers.adapter.config that lets it begin at zero, such as init_weights: true"
            )
        if moves_base:
            _check_convertible(wrapped)
        if moves_base and not bare:
            kept = get_peft_model_state_dict(wrapped)
            self._start = {name: t.detach().cpu().clone() for name, t in kept.items()}
        return wrapped

    def save(self, model: Any, target: Path) -> None:
        """Write what was trained to a folder, such that it fits the base as it was loaded."""
        if not self._start:
            model.save_pretrained(target, safe_serialization=True)
            return
        from safetensors.torch import save_file

        model.peft_config["default"].corda_config = None  # no part of what is saved
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            # peft adds the start as a second adapter for a moment, to subtract it
            warnings.filterwarnings("ignore", ".* changes the base weights", UserWarning)
            start = Path(folder) / "start"
            start.mkdir()
            save_file(self._start, start / "adapter_model.safetensors")
            model.save_pretrained(
                target,
                safe_serialization=True,
                path_initial_model_for_weight_conversion=str(start),
            )

    def _read(self, model: Any) -> None:
        """The rows through the base, one by one: peft's hooks sum up what each layer is given."""
        import torch

        with torch.no_grad():
            for row in self._rows:
                model(torch.tensor([row.input_ids], device=model.device), use_cache=False)

    def _peft_config(self, model: PreTrainedModel) -> Any:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = {str(k.value).lower(): cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        name = self.method.lower()
        if name not in known and name not in RECIPES:
            raise RequestError(
                f"levers.adapter.method: '{self.method}' is not a peft method; "
                f"{did_you_mean(name, [*known, *RECIPES, 'none', 'auto'])}"
            )
        config_class = known["lora" if name in RECIPES else name]
        accepted = config_class.__dataclass_fields__
        fields: dict[str, Any] = {"task_type": "CAUSAL_LM", **RECIPES.get(name, {})}
        if name == "lora" or name in RECIPES:
            r = self.r or self.config.get("r", RANK)
            fields |= {"r": r, "lora_alpha": self.alpha or 2 * r, "lora_dropout": self.dropout}
        else:
            fields |= self._given(accepted)
        if "target_modules" in accepted:
            fields |= self._targets(model, "target_parameters" in accepted)
        unknown = set(self.config) - set(accepted)
        if unknown:
            first = sorted(unknown)[0]
            raise RequestError(
                f"levers.adapter.config.{first}: not a field of {config_class.__name__}; "
                f"{did_you_mean(first, accepted)}"
            )
        if self._init in NEEDS_MORE:
            raise RequestError(
                f"levers.adapter.config.init_lora_weights: '{self._init}' needs a preparation that "
                "holdfast does not make; take corda (as levers.adapter.method) or pissa"
            )
        try:
            config = config_class(**fields | self.config)
        except (TypeError, ValueError) as error:
            raise RequestError(f"levers.adapter.config: peft refuses it: {error}") from error
        if config.is_prompt_learning:
            raise RequestError(
                f"levers.adapter.method: '{self.method}' puts tokens of its own before each row, "
                "which packed rows have no place for; take one that adapts matrices, such as lora"
            )
        return config

    def _given(self, accepted: Any) -> dict[str, Any]:
        """Rank, alpha and dropout under the names of a method other than LoRA.

        Raises:
            RequestError: the method has no such thing.
        """
        found: dict[str, Any] = {}
        for field, value, names in (
            ("r", self.r, ("r",)),
            ("alpha", self.alpha, ("lora_alpha", "alpha")),
            ("dropout", self.dropout or None, ("lora_dropout",)),
        ):
            name = next((name for name in names if name in accepted), None)
            if value is not None and name is None:
                hint = (
                    ": its config.effective_rank is the part that stays frozen"
                    if "effective_rank" in accepted
                    else "; leave it out, or set one of the fields of its config"
                )
                raise RequestError(f"levers.adapter.{field}: '{self.method}' has no {field}{hint}")
            if value is not None and name is not None:
                found[name] = value
        return found

    def _targets(self, model: PreTrainedModel, parameters_too: bool) -> dict[str, Any]:
        """Module names for peft, and, for experts fused into 3-D parameters, parameter names.

        What `freeze` holds is left out.
        """
        import torch

        frozen = {name for name, p in model.named_parameters() if getattr(p, "held", False)}
        if isinstance(self.target, list):
            if not frozen:
                return {"target_modules": self.target}
            ends = tuple(f".{name}" for name in self.target)
            named = [n for n, _ in model.named_modules() if f".{n}".endswith(ends)]
            moving = _moving(named, frozen) if named else self.target
            if not moving:
                raise RequestError(NOTHING_LEFT)
            return {"target_modules": moving}
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
        modules, fused = _moving(modules, frozen), [name for name in fused if name not in frozen]
        if not modules and not fused:
            raise RequestError(NOTHING_LEFT)
        if fused and not self.four_bit:
            # beside fused experts peft 0.21 takes a gate_proj, up_proj or down_proj by name for the
            # experts' own (those of shared experts and dense blocks, too); by weight it does not
            fused += [f"{name}.weight" for name in modules if _in_mlp(name)]
            modules = [name for name in modules if not _in_mlp(name)]
        return {"target_modules": modules} | ({"target_parameters": fused} if fused else {})


NOTHING_LEFT = (
    "levers.freeze: nothing is left for the adapter to train; freeze less, or widen "
    "levers.adapter.target"
)


def _logits(model: Any) -> torch.Tensor:
    """Of a few tokens, without dropout."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(8, device=model.device).remainder(vocabulary)[None]
    training = model.training
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    return found


def _moving(modules: list[str], frozen: set[str]) -> list[str]:
    """Those of the modules whose weight is not frozen."""
    return [name for name in modules if f"{name}.weight" not in frozen]


def _check_convertible(wrapped: Any) -> None:
    """Hold that B A - B0 A0 is all that is trained. Raises RequestError where something else is."""
    config = wrapped.peft_config["default"]
    inside = re.compile(r"\.lora_[AB]\.default\.weight$")
    other = [n for n, p in wrapped.named_parameters() if p.requires_grad and not inside.search(n)]
    if other or config.target_parameters or config.use_dora:
        named = other[0] if other else "fused experts" if config.target_parameters else "DoRA"
        raise RequestError(
            f"levers.adapter: init_lora_weights '{config.init_lora_weights}' changes the base, and "
            f"with {named} beside A and B what is trained could not be saved for the original one; "
            "take lora, or leave that out"
        )


def check_four_bit() -> None:
    """Raises RequestError where 4-bit weights cannot be loaded."""
    if find_spec("bitsandbytes") is None:
        raise RequestError(
            "levers.adapter.method: 'qlora' needs bitsandbytes; `pip install holdfast[quant]`, or "
            "set it to lora"
        )


def _in_mlp(name: str) -> bool:
    outside_attention = not ATTENTION_BLOCK.search(name)
    return outside_attention and bool(MLP_BLOCK.search(name) or MLP_FLAT.search(name))


PRESETS: dict[str, Callable[[str], object]] = {
    "mlp": _in_mlp,
    "attention": ATTENTION_BLOCK.search,
    "all-linear": lambda _name: True,
}
"""Whether a preset takes the matrix of this name."""
