"""Loading a model and its tokenizer, and the model as the objective sees it: backbone and head."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from holdfast.errors import RequestError
from holdfast.section import Section

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from holdfast.objective import Head


class Model(Section):
    """Which model to start from."""

    path: str
    """A local folder in transformers format, or a hub id."""
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


PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def check_folder(settings: Model) -> None:
    """Check without torch what can be: a local folder must hold config, safetensors, tokenizer.

    A path that does not exist is taken for a hub id, unless it looks local.

    Raises:
        RequestError: every problem, one line each.
    """
    problems = [*_path_problems(settings), *_tokenizer_problems(settings)]
    if problems:
        raise RequestError(*problems)


def _path_problems(settings: Model) -> Iterator[str]:
    folder = Path(settings.path).expanduser()
    named = f"model.path: '{settings.path}'"
    if not folder.exists():
        if _looks_local(settings.path):
            siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            close = get_close_matches(folder.name, siblings, n=1)
            hint = f"did you mean '{folder.parent / close[0]}'?" if close else "give a folder"
            yield (
                f"{named} does not exist; {hint} in transformers format (config.json, "
                "*.safetensors, tokenizer files) or a hub id such as Qwen/Qwen3-0.6B"
            )
    elif not folder.is_dir():
        yield f"{named} is a file; give the folder that holds config.json"
    elif (folder / "config.json").is_file():
        yield from _config_problems(folder / "config.json")
        yield from _weight_problems(folder, named)
        if settings.tokenizer is None and not any((folder / name).is_file() for name in TOKENIZERS):
            yield (
                f"{named} has no tokenizer; set model.tokenizer to the folder or hub id of the one "
                "it was trained with"
            )
    elif (folder / "adapter_config.json").is_file():
        yield (
            f"{named} is an adapter; merge it into its base first (peft: merge_and_unload, "
            "save_pretrained) and give that folder"
        )
    else:
        yield f"{named} has no config.json; give a folder written by save_pretrained"


def _config_problems(file: Path) -> Iterator[str]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"{file}: not JSON ({error}); give a folder written by save_pretrained"
        return
    if not isinstance(config, dict) or "model_type" not in config:
        yield (
            f"{file}: field model_type is missing; give a folder written by save_pretrained, such "
            "as one with model_type llama"
        )


def _weight_problems(folder: Path, named: str) -> Iterator[str]:
    if any(folder.glob("*.safetensors")):
        return
    pickles = [p.name for pattern in PICKLES for p in folder.glob(pattern)]
    if pickles:
        yield (
            f"model.path: '{folder / pickles[0]}' is a pickle and is never loaded; convert it with "
            "save_pretrained(..., safe_serialization=True) and give that folder"
        )
    else:
        yield f"{named} has no *.safetensors weights; give a folder written by save_pretrained"


def _tokenizer_problems(settings: Model) -> Iterator[str]:
    where, template = settings.tokenizer, settings.chat_template
    if where is not None and _looks_local(where) and not Path(where).expanduser().is_dir():
        yield (
            f"model.tokenizer: folder '{where}' does not exist; give the folder or hub id of the "
            "tokenizer that the model was trained with"
        )
    if template is not None and "{" not in template and not Path(template).is_file():
        yield (
            f"model.chat_template: '{template}' is neither a file nor a Jinja template; give one "
            "of the two, or leave it out for the tokenizer's own"
        )


def _expanded(path: str) -> str:
    """A folder below ~ in full; a hub id as it is."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a missing pad token becomes EOS (padding is masked everywhere)."""
    from transformers import AutoTokenizer

    where = _expanded(settings.tokenizer or settings.path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where,
            revision=settings.revision if settings.tokenizer is None else None,
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
        tokenizer.chat_template = template if inline else Path(template).read_text(encoding="utf-8")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise RequestError(
                f"tokenizer '{where}' has neither pad nor EOS token; holdfast needs an end token "
                "to teach a model where to stop"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    settings: Model, *, adapter: bool, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load the causal LM for training, dropout off, and check that the tokenizer fits it.

    Dropout is off because its noise would read as divergence from the base at zero drift.

    Raises:
        RequestError: not loadable, not safetensors, or the tokenizer has ids beyond the embedding.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    check_folder(settings)
    extra = (
        {"attn_implementation": settings.attn_implementation}
        if settings.attn_implementation
        else {}
    )
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            _expanded(settings.path),
            revision=settings.revision,
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
    silence(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise RequestError(
            f"tokenizer '{settings.tokenizer or settings.path}' has {len(tokenizer)} tokens but "
            f"the model's embedding has {rows} rows; give the tokenizer the model was trained with"
        )
    check_head(model)
    return model


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
        cap=getattr(config, "final_logit_softcapping", None),
    )


def hidden_states(model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, W, H), after the final norm, without computing the logits.

    The call goes through the outermost wrapper, so that DDP and FSDP see it; the backbone's output
    is caught on its way to the head, which is asked for one position only.
    """
    lm = causal_lm(model)
    keep = {"logits_to_keep": 1} if _takes_logits_to_keep(type(lm)) else {}
    with _caught(lm.get_decoder()) as caught:
        model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **keep)
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
    if ours.shape != theirs.shape or not torch.allclose(
        ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())
    ):
        raise RequestError(
            f"model.path: the output head of {type(model).__name__} is not a linear layer with "
            "known scaling; holdfast would train a wrong loss, so give another model"
        )


def write_on(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    stop: Sequence[str] = (),
) -> list[list[int]]:
    """What the model writes after each prompt, up to and with its end token, as one batch.

    The model's own generation settings (top_p, a repetition penalty, ...) would bend its
    distribution, so only their end tokens count.

    Args:
        temperature: 1 samples the model's own distribution; None takes the likeliest token.
        stop: strings after which to stop.
    """
    import torch
    from transformers import GenerationConfig

    lm = causal_lm(model)
    theirs, training = lm.generation_config, lm.training
    ends = theirs.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    # what a config given to generate() leaves out is filled in from the model's own
    lm.generation_config = GenerationConfig()
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    lm.eval()
    try:
        with torch.inference_mode():
            out = lm.generate(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    **sampled,
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=tokenizer.pad_token_id,
                    stop_strings=list(stop) or None,
                ),
                tokenizer=tokenizer if stop else None,
            )
    finally:
        lm.generation_config = theirs
        lm.train(training)
    rows = out[:, width:].tolist()
    lengths = [next((i for i, t in enumerate(r, 1) if t in ends), len(r)) for r in rows]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def hash_weights(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and bytes of all parameters: what the base is known by."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
