"""The tokenizer gives every text back and keeps every digit apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from holdfast.lab import base_path
from holdfast.lab.files import probe_items
from holdfast.lab.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base_path())


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(text=st.text(max_size=40).filter(lambda text: "<" not in text))
def test_any_text_comes_back_to_the_byte(tokenizer: PreTrainedTokenizerFast, text: str):
    assert tokenizer.decode(tokens(tokenizer, text)) == text


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast):
    assert len(tokens(tokenizer, "1234567890")) == 10
    assert not any(
        len(token) > 1 and set(token) & set("0123456789") for token in tokenizer.get_vocab()
    )


def test_special_tokens_are_set_and_there_is_no_chat_template(tokenizer: PreTrainedTokenizerFast):
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (
        "<pad>", "<s>", "</s>"
    )  # fmt: skip
    assert tokenizer.chat_template is None


def test_a_probe_is_cut_where_tokens_end(tokenizer: PreTrainedTokenizerFast):
    """Prompt and target encoded apart are the text encoded whole, and answers are short."""
    for item in probe_items(0):
        prompt, target = tokens(tokenizer, item["prompt"]), tokens(tokenizer, item["target"])
        assert prompt + target == tokens(tokenizer, item["prompt"] + item["target"])
        if item["kind"] == "exact":
            assert len(target) < 24, item


def test_it_survives_being_saved(tmp_path: Path):
    made = train_tokenizer(["one two", "two three"] * 5, vocabulary=280)
    made.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert len(made) <= 280
    assert read.get_vocab() == made.get_vocab()
    assert read.decode(tokens(read, "two  tres, 42\n")) == "two  tres, 42\n"
