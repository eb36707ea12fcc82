"""Loading a model and its tokenizer, and the model as the objective sees it: backbone and head."""

from __future__ import annotations

import hashlib
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from holdfast.errors import RequestError
from holdfast.lineage import expanded, locate, looks_local, tokenizer_in
from holdfast.section import Section

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from holdfast.objective import Head


class Model(Section):
    """Which model to start from."""

    path: str
    """A local folder in transformers format, a hub id, or an earlier stage: the folder of a run or
    of an adapter, which is merged into its base in memory."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights in memory. auto: float32 on a CPU; on an accelerator bfloat16 under an adapter and
    float32 (with bfloat16 autocast) for full fine-tuning."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer where it is not the model's own."""
    chat_template: str | None = None
    """A Jinja chat template, or the path of a file with one, in place of the tokenizer's own."""
    attn_implementation: str | None = None
    """transformers' attention implementation; empty: its default."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless asked for by name."""


def check_folder(settings: Model) -> None:
    """Check without torch what can be: a local folder must hold config, safetensors, tokenizer.

    A path that does not exist is taken for a hub id, unless it looks local.

    Raises:
        RequestError: every problem, one line each.
    """
    problems: list[str] = []
    try:
        stage = locate(settings.path, settings.revision)
    except RequestError as error:
        problems += error.problems
    else:
        if settings.tokenizer is None and stage.tokenizer is None:
            problems.append(
                f"model.path: '{settings.path}' has no tokenizer; set model.tokenizer to the "
                "folder or hub id of the one it was trained with"
            )
    problems += _tokenizer_problems(settings)
    if problems:
        raise RequestError(*problems)


def _tokenizer_problems(settings: Model) -> Iterator[str]:
    where, template = settings.tokenizer, settings.chat_template
    if where is not None and looks_local(where) and not Path(where).expanduser().is_dir():
        yield (
            f"model.tokenizer: folder '{where}' does not exist; give the folder or hub id of the "
            "tokenizer that the model was trained with"
        )
    if template is not None and "{" not in template and not Path(template).expanduser().is_file():
        yield (
            f"model.chat_template: '{template}' is neither a file nor a Jinja template; give one "
            "of the two, or leave it out for the tokenizer's own"
        )


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a missing pad token becomes EOS (padding is masked everywhere)."""
    from transformers import AutoTokenizer

    where = settings.tokenizer or tokenizer_in(Path(settings.path).expanduser())
    revision = None
    if where is None:
        stage = locate(settings.path, settings.revision)
        where = stage.tokenizer or settings.path
        revision = stage.revision if where == stage.model else None
    where = expanded(where)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where,
            revision=revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:
        raise RequestError(
            f"tokenizer '{where}' cannot be loaded: {_first_line(error)}; give the folder or hub "
            "id of the one that the model was trained with"
        ) from error
    template = settings.chat_template
    if template is not None:
        inline = "{" in template
        file = Path(template).expanduser()
        tokenizer.chat_template = template if inline else file.read_text(encoding="utf-8")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise RequestError(
                f"tokenizer '{where}' has neither pad nor EOS token; holdfast needs an end token "
                "to teach a model where to stop"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    settings: Model,
    *,
    adapter: bool,
    tokenizer: PreTrainedTokenizerBase,
    four_bit_on: str | None = None,
) -> PreTrainedModel:
    """Load the causal LM for training, dropout off, and check that the tokenizer fits it.

    Dropout is off because its noise would read as divergence from the base at zero drift.

    Args:
        four_bit_on: the device on which the matrices of its layers are held in NF4, if at all.

    Raises:
        RequestError: not loadable, not safetensors, or the tokenizer has ids beyond the embedding.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    check_folder(settings)
    stage = locate(settings.path, settings.revision)
    extra: dict[str, Any] = (
        {"attn_implementation": settings.attn_implementation}
        if settings.attn_implementation
        else {}
    )
    if four_bit_on is not None:
        if stage.adapters:
            raise RequestError(
                f"model.path: '{settings.path}' is an adapter, and cannot be merged into a base in "
                "4 bits exactly; give a merged model, or set levers.adapter.method to lora"
            )
        extra |= _four_bit(dtype_of(settings, adapter=adapter), four_bit_on)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            stage.model,
            revision=stage.revision,
            dtype=dtype_of(settings, adapter=adapter),
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            **extra,
        )
    except Exception as error:
        raise RequestError(
            f"model.path: '{settings.path}' cannot be loaded: {_first_line(error)}; give a causal "
            "language model that transformers knows, whole and in safetensors"
        ) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise RequestError(
            f"model.path: '{settings.path}' is an adapter on the hub; download it and give the "
            "folder, so that it is merged into its base"
        )
    silence(model)
    for module in model.modules():
        # bitsandbytes would repack weights at the first reading on a CPU, for a product without a
        # gradient: training would go on without one
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    for folder in stage.adapters:
        model = _merged(model, folder, settings.path)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise RequestError(
            f"tokenizer '{settings.tokenizer or settings.path}' has {len(tokenizer)} tokens but "
            f"the model's embedding has {rows} rows; give the tokenizer the model was trained with"
        )
    check_head(model)
    return model


def _four_bit(compute: torch.dtype, device: str) -> dict[str, Any]:
    """NF4 with quantized scales, as QLoRA has it (arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    return {
        "device_map": {"": device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
    }


def _merged(model: PreTrainedModel, adapter: Path, named: str) -> PreTrainedModel:
    """The model with an adapter's change added to its weights; only safetensors are read.

    Raises:
        RequestError: the adapter was made for another base, or cannot be merged exactly (as on a
            head whose weights are also the embedding's).
    """
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    ids = torch.arange(8).remainder(model.config.get_text_config().vocab_size)[None]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of peft's: what they tell of is checked below
            weights = load_file(adapter / "adapter_model.safetensors")
            if broken := [name for name, t in weights.items() if not t.isfinite().all()]:
                raise RequestError(
                    f"model.path: '{named}': adapter '{adapter}' holds values that are not finite "
                    f"({broken[0]}); give one of an earlier checkpoint"
                )
            config = PeftConfig.from_pretrained(str(adapter))
            config.inference_mode = True
            tuned = PeftModel(model, config).eval()
            expected = get_peft_model_state_dict(tuned, save_embedding_layers=False)
            lacking = sorted(expected.keys() - weights.keys())
            strange = set_peft_model_state_dict(tuned, weights).unexpected_keys
            if lacking or strange:
                name = [*lacking, *strange][0]
                raise ValueError(f"{name} is {'missing in' if lacking else 'not for'} it")
            before = tuned(input_ids=ids, use_cache=False).logits.float()
            merged: PreTrainedModel = tuned.merge_and_unload(safe_merge=True)
            after = merged(input_ids=ids, use_cache=False).logits.float()
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(
            f"model.path: '{named}': adapter '{adapter}' does not fit its base "
            f"'{model.name_or_path}': {_first_line(error)}; give the base that it was trained on, "
            "as base_model_name_or_path in adapter_config.json"
        ) from error
    rounding = 1e-2 if model.dtype == torch.float32 else 1e-1  # merged weights are rounded once
    if not torch.allclose(before, after, rtol=rounding, atol=rounding * float(before.abs().max())):
        raise RequestError(
            f"model.path: '{named}': adapter '{adapter}' cannot be merged into its base without "
            "changing what the model computes (are tied weights adapted?); give a merged model"
        )
    return merged.requires_grad_(True).train(model.training)


NOISE = re.compile(r"drop|jitter")
"""Names of the settings that make a forward pass in training mode random."""


def silence(model: PreTrainedModel) -> None:
    """Turn off all that makes a forward pass random: dropout by whatever name, router jitter."""
    import torch

    modules = list(model.modules())
    for owner in (*modules, *(module.config for module in modules if hasattr(module, "config"))):
        if isinstance(owner, torch.nn.Dropout):
            owner.p = 0.0
        for name, value in list(vars(owner).items()):
            if NOISE.search(name) and isinstance(value, float):
                setattr(owner, name, 0.0)


def dtype_of(settings: Model, *, adapter: bool) -> torch.dtype:
    """What the weights are held in; see `Model.dtype`."""
    import torch

    if settings.dtype != "auto":
        named: torch.dtype = getattr(torch, settings.dtype)
        return named
    return torch.bfloat16 if adapter and torch.cuda.is_available() else torch.float32


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside DDP, torch.compile and peft wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module") and not hasattr(model, "config"):
            model = model.module
        else:
            lm: PreTrainedModel = model
            return lm


def head(model: Any) -> Head:
    """The model's output head (weights shared, not copied).

    Raises:
        RequestError: it carries an adapter, so that it is more than its weight.
    """
    from holdfast.objective import Head

    lm = causal_lm(model)
    layer, config = lm.get_output_embeddings(), lm.config.get_text_config()
    if hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
        raise RequestError(
            "levers.adapter: the output head cannot carry an adapter, which the loss would not "
            "see; leave it out of levers.adapter.target, or train it whole: "
            "levers.adapter.config.modules_to_save: [lm_head]"
        )
    multiplier = float(
        getattr(lm, "logit_scale", None) or getattr(config, "logit_scale", None) or 1
    )
    divisor = float(getattr(config, "logits_scaling", None) or 1)
    return Head(
        layer.weight,
        getattr(layer, "bias", None),
        scale=multiplier / divisor,
        cap=getattr(config, "final_logit_softcapping", None)
        or getattr(config, "logits_soft_cap", None),  # RecurrentGemma's
    )


def hidden_states(
    model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, **more: Any
) -> torch.Tensor:
    """Last hidden states (B, W, H), after the final norm, without computing the logits.

    `more` goes to the model as it is, such as a cache and the mask that goes with it.

    The call goes through the outermost wrapper, so that DDP and FSDP see it; the backbone's output
    is caught on its way to the head, which is asked for one position only.
    """
    lm = causal_lm(model)
    keep = {"logits_to_keep": 1} if _takes_logits_to_keep(type(lm)) else {}
    settings = {"use_cache": False} | keep | more
    with _caught(lm.get_decoder()) as caught:
        model(input_ids=input_ids, position_ids=position_ids, **settings)
    last: torch.Tensor = caught[0]
    return last


@contextmanager
def _caught(backbone: Any) -> Iterator[list[Any]]:
    caught: list[Any] = []
    hook = backbone.register_forward_hook(lambda _m, _i, out: caught.append(out[0]))
    try:
        yield caught
    finally:
        hook.remove()


def _takes_logits_to_keep(lm_class: Any) -> bool:
    return "logits_to_keep" in inspect.signature(lm_class.forward).parameters


def check_head(model: PreTrainedModel) -> None:
    """Hold that `head(hidden_states(x))` is what the model itself computes; a few tokens.

    A model whose head does something unknown is refused rather than trained on a wrong loss.
    """
    import torch

    ids = torch.arange(8, device=model.device).remainder(model.config.get_text_config().vocab_size)
    ids = ids.unsqueeze(0)
    positions = torch.arange(8, device=model.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ours = head(model)(hidden_states(model, ids, positions)[0])
            theirs = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    except (AttributeError, IndexError, TypeError) as error:
        raise RequestError(
            f"model.path: {type(model).__name__} is not a decoder with an output head that "
            f"transformers would name ({_first_line(error)}); give a causal language model"
        ) from error
    finally:
        model.train(was_training)
    if not theirs.isfinite().all():
        raise RequestError(
            f"model.path: '{model.name_or_path}': its logits are not finite; give weights without "
            "NaN, or, where they overflow in half precision, model.dtype: float32"
        )
    if ours.shape != theirs.shape or not torch.allclose(
        ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())
    ):
        raise RequestError(
            f"model.path: the output head of {type(model).__name__} is not a linear layer with "
            "known scaling; holdfast would train a wrong loss, so give another model"
        )


def hash_weights(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and bytes of all parameters: what the base is known by."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def plain_config(model: Any) -> dict[str, Any]:
    """What its configuration says of a model, without where it lies and who wrote it."""
    settings = causal_lm(model).config.to_dict()
    return {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}


def _first_line(error: BaseException) -> str:
    """The first line that says something: not one that only announces the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.endswith(":")]
    return next(iter([*telling, *lines]), type(error).__name__)
