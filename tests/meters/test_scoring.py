"""Likelihoods and greedy answers, the same however the texts fall into batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse, Replace, Sequence, Strip
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import tiny
from holdfast import decode
from holdfast.meters import scoring
from holdfast.meters.scoring import Scored, greedy, mean_nlls

MODELS = {name: tiny.tiny(name) for name in ("Llama", "GPT2", "Mixtral", "OPT")}
DOUBLES = {
    name: tiny.tiny(name, experts_implementation="eager").double()  # fused kernels know no double
    for name in MODELS
}
TOKENIZER = tiny.letters()

texts = st.lists(
    st.lists(
        st.tuples(st.integers(0, tiny.VOCABULARY - 1), st.booleans()), min_size=1, max_size=20
    ),
    max_size=9,
)


def one_alone(model: Any, text: Scored) -> float:
    """The mean of -log softmax in float64, over one text without padding."""
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([text.input_ids])).logits[0].log_softmax(-1)
    nlls = [
        -float(logp[i - 1, token])
        for i, (token, scored) in enumerate(zip(text.input_ids, text.loss_mask, strict=True))
        if scored and i
    ]
    return sum(nlls) / len(nlls) if nlls else math.nan


@given(texts, st.integers(1, 80), st.sampled_from(sorted(MODELS)))
@settings(max_examples=30, deadline=None)
def test_mean_nlls_are_those_of_each_text_alone(drawn: Any, budget: int, name: str) -> None:
    given_texts = [Scored([t for t, _ in rows], [m for _, m in rows]) for rows in drawn]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "BATCH_TOKENS", budget)
        ours = mean_nlls(MODELS[name], given_texts)
    expected = [one_alone(DOUBLES[name], text) for text in given_texts]
    assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_each_text_once_and_stay_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = list(scoring.token_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_an_answer_keeps_the_space_that_its_tokenizer_takes_off_a_text() -> None:
    """As SentencePiece's decoders do: code that goes on after a prompt would lose its indent."""
    words = Tokenizer(WordLevel({"▁▁": 0, "▁": 1, "x": 2, "y": 3, "?": 4}, unk_token="?"))
    words.decoder = Sequence([Replace("▁", " "), Fuse(), Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([0, 3]) == " y"
    assert scoring._after([1, 2], [0, 3], tokenizer) == "  y"


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_left_as_it_was(training: bool) -> None:
    model = tiny.tiny("Llama").train(training)
    mean_nlls(model, [Scored([1, 2], [False, True])])
    greedy(model, TOKENIZER, [[1, 2]], max_new_tokens=2, stop=["."])
    assert model.training is training


# ---- greedy


PROMPTS = [[tiny.BOS, *range(3, 3 + n)] for n in (1, 9, 4, 2, 6, 12)]


def alone(model: Any, prompt: list[int], length: int) -> str:
    """The likeliest token by plain forward passes, one by one, up to the end token."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + length and (len(ids) == len(prompt) or ids[-1] != tiny.EOS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    text: str = TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("slots", [2, 256])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_likeliest_token_whatever_stands_beside_it(
    name: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MOST_SLOTS", slots)
    model = MODELS[name]
    answers = greedy(model, TOKENIZER, PROMPTS, max_new_tokens=8, stop=[])
    assert answers == [alone(model, prompt, 8) for prompt in PROMPTS]
    assert len(set(answers)) > 2
    single = [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
        )[0, len(prompt) :]
        for prompt in PROMPTS
    ]
    assert answers == TOKENIZER.batch_decode(single, skip_special_tokens=True)


def test_an_answer_ends_before_the_first_stop_string() -> None:
    model = MODELS["Llama"]
    whole = [alone(model, prompt, 12) for prompt in PROMPTS]
    marks = [whole[4][3:5], whole[2][4]]
    answers = greedy(model, TOKENIZER, PROMPTS, max_new_tokens=12, stop=marks)
    expected = [min((text.split(mark, 1)[0] for mark in marks), key=len) for text in whole]
    assert answers == expected
    assert expected != whole


def test_an_answer_stops_at_the_end_token() -> None:
    """The end token is the one that the model writes third."""
    model = tiny.tiny("Llama")
    prompt = PROMPTS[2]
    whole = TOKENIZER(alone(model, prompt, 6), add_special_tokens=False)["input_ids"]
    assert whole.index(whole[2]) == 2
    model.generation_config.eos_token_id = whole[2]
    (answer,) = greedy(model, TOKENIZER, [prompt], max_new_tokens=6, stop=[])
    assert answer == TOKENIZER.decode(whole[:3])
