"""Tiny tokenizers, built here: one token a byte, with special tokens and a template as asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """One token for each byte; ``bos_token="<s>"`` and the like name the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*dict.fromkeys(special.values()), "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    return byte_tokenizer


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    """A base model's tokenizer: BOS and EOS, no template."""
    return byte_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    """A chat model's tokenizer: no BOS, ``<|im_end|>`` as EOS, ChatML without markers."""
    return byte_tokenizer(CHATML, eos_token="<|im_end|>")
