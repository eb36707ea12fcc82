"""Random models of many architectures, small enough to train in a test, and their tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

LETTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789+=.,?!"
SPECIAL = ["<s>", "</s>", "<pad>", "<user>", "<bot>"]
BOS, EOS, PAD, USER, BOT = range(len(LETTERS), len(LETTERS) + len(SPECIAL))
VOCABULARY = len(LETTERS) + len(SPECIAL)
CHAT = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
"""A user's turn has no end mark of its own: the assistant's marker ends it."""

SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough for the distribution not to be flat
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
GROUPED = {"num_key_value_heads": 2}
EXTRA: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "GPT2": {"n_inner": 48},
    "GPTNeoX": {},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Glm4Moe": GROUPED
    | {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    | {"first_k_dense_replace": 1},
    "Gemma2": GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "Cohere": GROUPED | {"logit_scale": 0.25},
    "Granite": GROUPED | {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Falcon": {"new_decoder_architecture": False, "multi_query": True},
}
"""What each architecture needs beside `SIZE`; the name is that of its classes in transformers."""


def tiny(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of an architecture, in eval mode; the same seed gives the same weights."""
    config = getattr(transformers, f"{name}Config")(**SIZE | EXTRA[name] | settings)
    lm_class = getattr(transformers, f"{name}ForCausalLM", None) or transformers.GPT2LMHeadModel
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = lm_class(config)
    return model.eval()


def letters(chat: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A token a letter. Special tokens are BOS, EOS and PAD unless others are given."""
    vocabulary = {token: i for i, token in enumerate([*LETTERS, *SPECIAL])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    names = special or {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat
    return tokenizer


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Model and tokenizer as a folder that a recipe can name."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Rows as a file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def moved(model: torch.nn.Module, spread: float = 0.1, seed: int = 1) -> None:
    """Move all that is trained, by as much as a long training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(spread * torch.randn(parameter.shape, generator=random))
