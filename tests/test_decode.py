"""Writing on: token for token what transformers' generate writes, and draws from the softmax."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import MambaConfig, MambaForCausalLM

import tiny
from holdfast import decode, slots
from holdfast.decode import choose, write_on
from holdfast.errors import RequestError

TOKENIZER = tiny.letters()
PROMPTS = [[tiny.BOS, *range(3, 3 + n)] for n in (1, 9, 4, 2, 6, 0, 12)]
BENT = {
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.2,
    "typical_p": 0.5,
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [1, 2, 3],
}
"""What a model's generation_config.json may carry."""


def mamba() -> Any:
    """A recurrent model, whose memory is no keys and values."""
    config = MambaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=tiny.BOS,
        eos_token_id=tiny.EOS,
        pad_token_id=tiny.PAD,
        use_mambapy=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MambaForCausalLM(config).eval()


def in_slots(model: Any) -> bool:
    with torch.inference_mode():
        return slots.shapes(model) is not None


def generated(
    model: Any, prompts: Sequence[list[int]], most: int, padded: bool = True, **extra: Any
) -> list[list[int]]:
    """What generate() writes, left-padded as one batch or one by one, up to the end token."""
    batches = [prompts] if padded else [[prompt] for prompt in prompts]
    rows = []
    for batch in batches:
        width = max(map(len, batch))
        ids = torch.tensor([[tiny.PAD] * (width - len(p)) + p for p in batch])
        out = model.generate(
            input_ids=ids,
            attention_mask=(torch.arange(width) >= width - torch.tensor([[len(p)] for p in batch]))
            .long()
            .clone(),
            max_new_tokens=most,
            do_sample=False,
            **extra,
        )
        rows += out[:, width:].tolist()
    ends = (row.index(tiny.EOS) + 1 if tiny.EOS in row else len(row) for row in rows)
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


# ---- the likeliest tokens


SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
CASES = [(name, {}) for name in tiny.EXTRA] + [("Gemma2", SLIDING)]


@pytest.mark.parametrize("refill", [False, True])
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_greedy_is_what_generate_writes(name: str, changes: Any, refill: bool) -> None:
    model = tiny.tiny(name, **changes)
    assert in_slots(model)
    ours = write_on(model, TOKENIZER, PROMPTS, max_new_tokens=24, slots=3, refill=refill)
    assert ours == generated(model, PROMPTS, 24)
    assert len(set(map(tuple, ours))) > 2


@pytest.mark.parametrize("make", [lambda: tiny.tiny("Llama"), mamba])
def test_each_prompt_has_its_own_length(make: Any) -> None:
    model, limits = make(), [3, 0, 9, 1, 5, 2, 7]
    whole = generated(model, PROMPTS, 9, padded=False)
    ours = write_on(model, TOKENIZER, PROMPTS, max_new_tokens=limits, slots=2)
    assert ours == [row[:limit] for row, limit in zip(whole, limits, strict=True)]


def test_a_recurrent_model_is_left_to_generate() -> None:
    model = mamba()
    assert not in_slots(model)
    ours = write_on(model, TOKENIZER, PROMPTS, max_new_tokens=24, slots=3)
    assert ours == generated(model, PROMPTS, 24, padded=False)
    assert len(set(map(tuple, ours))) > 2


def test_a_cache_that_the_model_misreads_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial: keys and values of the wrong columns change the logits, and generate writes."""
    model = tiny.tiny("Llama")
    expected = generated(model, PROMPTS, 12)
    right = slots.SlotLayer.update

    def shifted(self: Any, keys: Any, values: Any, *rest: Any, **more: Any) -> Any:
        keys, values = right(self, keys, values, *rest, **more)
        return keys.roll(1, 2), values

    monkeypatch.setattr(slots.SlotLayer, "update", shifted)
    assert not in_slots(model)
    assert write_on(model, TOKENIZER, PROMPTS, max_new_tokens=12) == expected


@pytest.mark.parametrize("make", [lambda: tiny.tiny("GPT2"), mamba])
def test_a_row_ends_with_a_stop_string_as_in_generate(make: Any) -> None:
    """Also where the prompt holds its first letters: transformers looks at the whole text."""
    model = make()
    text = [*tiny.LETTERS, *tiny.SPECIAL]
    free = generated(model, PROMPTS, 16, padded=False)
    long = max((row for i, row in enumerate(free) if i != 1), key=len)
    straddling = text[PROMPTS[1][-1]] + text[free[1][0]]
    stop = [text[long[2]] + text[long[3]], straddling]
    expected = generated(model, PROMPTS, 16, padded=False, stop_strings=stop, tokenizer=TOKENIZER)
    ours = write_on(model, TOKENIZER, PROMPTS, max_new_tokens=16, stop=stop, slots=3)
    assert ours == expected
    assert len(ours[1]) == 1
    assert expected != free
    assert write_on(model, TOKENIZER, PROMPTS, max_new_tokens=16, stop=["\u00e9"]) == free


def test_an_adapter_writes_too() -> None:
    model = get_peft_model(tiny.tiny("Llama"), LoraConfig(target_modules="all-linear", r=2))
    before = generated(model, PROMPTS, 10)
    tiny.moved(model, 0.3)
    ours = write_on(model, TOKENIZER, PROMPTS, max_new_tokens=10, slots=4)
    assert ours == generated(model, PROMPTS, 10) != before
    with model.disable_adapter():
        assert write_on(model, TOKENIZER, PROMPTS, max_new_tokens=10) == before


def test_only_the_end_tokens_of_the_models_own_generation_settings_count() -> None:
    """Likeliest tokens one by one, by the logits alone; the second of them is named an end."""
    model = tiny.tiny("Llama")
    prompt, expected = [tiny.BOS, 5, 6], []
    for _ in range(6):
        ids = torch.tensor([prompt + expected])
        expected.append(int(model(input_ids=ids).logits[0, -1].argmax()))
    for lm in (model, mamba()):
        lm.generation_config.update(**BENT | {"min_new_tokens": 6})
        before = lm.generation_config.to_dict()
        lm.train()
        written = write_on(lm, TOKENIZER, [prompt], max_new_tokens=6)
        assert lm.generation_config.to_dict() == before
        assert lm.training
        assert (written == [expected]) == (lm is model)
    model.generation_config.eos_token_id = [expected[1], tiny.EOS]
    first = expected.index(expected[1])
    assert write_on(model, TOKENIZER, [prompt], max_new_tokens=6) == [expected[: first + 1]]


# ---- drawn tokens


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("make", [lambda: tiny.tiny("Llama", initializer_range=0.1), mamba])
def test_first_tokens_are_drawn_from_the_whole_softmax(make: Any, temperature: float) -> None:
    """Frequencies of 4,000 first tokens against the softmax in float64, by chi-square (scipy).

    Cells with fewer than 5 expected are pooled, as is the rule; the seed is fixed, and a right
    sampler would fail for one seed in a thousand.
    """
    model = make()
    model.generation_config.update(**BENT)
    rows = write_on(
        model, TOKENIZER, [[tiny.BOS]] * 4000, max_new_tokens=1, temperature=temperature
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tiny.BOS]])).logits[0, 0].double()
    counts = Counter(token for (token,) in rows)
    assert fit(counts, (logits / temperature).softmax(-1) * len(rows), least=20) > 0.001
    assert all(counts[token] for token in BENT["suppress_tokens"])  # type: ignore[attr-defined]


def test_later_tokens_are_drawn_after_the_earlier_ones() -> None:
    """Second tokens after the likeliest first one, of rows that enter at different times."""
    model = tiny.tiny("Llama", initializer_range=0.1)
    rows = write_on(
        model,
        TOKENIZER,
        [[tiny.BOS]] * 6000,
        max_new_tokens=[2 + i % 3 for i in range(6000)],
        temperature=1.0,
        refill=True,
    )
    ((first, count),) = Counter(row[0] for row in rows).most_common(1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tiny.BOS, first]])).logits[0, 1].double()
    counts = Counter(row[1] for row in rows if row[0] == first)
    assert counts.total() == count > 200
    assert fit(counts, logits.softmax(-1) * count, least=5) > 0.001


def fit(counts: Counter[int], expected: torch.Tensor, least: int) -> float:
    """P-value of the counts."""
    observed = torch.tensor([counts[token] for token in range(tiny.VOCABULARY)]).double()
    rare = expected < 5
    cells = [
        torch.cat([values[~rare], values[rare].sum().reshape(-1)])
        for values in (observed, expected)
    ]
    keep = cells[1] > 0
    assert int(keep.sum()) > least
    return float(chisquare(cells[0][keep], cells[1][keep]).pvalue)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 200)),
        elements=st.floats(-30, 30, width=32),
    ),
    st.integers(0, 2**32),
    st.sampled_from([0.5, 1.0, 3.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_token_is_the_one_whose_interval_holds_the_number(
    logits: Any, seed: int, temperature: float
) -> None:
    """Against numpy in float64; a number within 1e-6 of a border may fall on either side."""
    uniform = np.random.default_rng(seed).random(len(logits))
    tokens = choose(torch.tensor(logits), torch.tensor(uniform), temperature).tolist()
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max(1, keepdims=True))
    upto = (p / p.sum(1, keepdims=True)).cumsum(1)
    for row, token in enumerate(tokens):
        begin = upto[row, token - 1] if token else 0.0
        assert begin - 1e-6 <= uniform[row] <= upto[row, token] + 1e-6


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_token_that_cannot_be_is_never_drawn(uniform: float) -> None:
    logits = torch.full((1, 130), -torch.inf)
    logits[0, [70, 75]] = 1.0
    (token,) = choose(logits, torch.tensor([uniform], dtype=torch.float64), 1.0).tolist()
    assert token == (70 if uniform == 0 else 75)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_row_depends_on_its_number_alone(data: st.DataObject) -> None:
    """Not on slots, on neighbours, or on when it enters; in float64, where no draw is that near."""
    prompts = data.draw(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=9))
    first = data.draw(st.integers(0, 3))
    limits = data.draw(st.lists(st.integers(1, 12), min_size=len(prompts), max_size=len(prompts)))
    ours = write_on(
        DOUBLE,
        TOKENIZER,
        prompts,
        max_new_tokens=limits,
        temperature=1.0,
        seed=[7],
        first=first,
        slots=data.draw(st.integers(1, 5)),
        refill=data.draw(st.booleans()),
    )
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        alone = write_on(
            DOUBLE,
            TOKENIZER,
            [prompt],
            max_new_tokens=limit,
            temperature=1.0,
            seed=[7],
            first=first + i,
        )
        assert alone == [ours[i]]


DOUBLE = tiny.tiny("Llama").double()


def test_both_ways_to_write_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PROMPTS * 3
    drawn = {"max_new_tokens": 10, "temperature": 1.0, "seed": [3]}
    ours = write_on(DOUBLE, TOKENIZER, prompts, **drawn)
    before = torch.get_rng_state()
    monkeypatch.setattr(decode, "shapes", lambda lm: None)
    assert write_on(DOUBLE, TOKENIZER, prompts, **drawn, slots=4) == ours
    assert torch.equal(torch.get_rng_state(), before)
    assert write_on(DOUBLE, TOKENIZER, prompts, **drawn | {"seed": [4]}) != ours


# ---- what it costs


def test_what_all_prompts_begin_with_is_read_once() -> None:
    model = tiny.tiny("Llama")
    read: list[int] = []
    prompts = [[tiny.BOS, *range(20), last, 3] for last in range(20)]
    expected = generated(model, prompts, 3)
    model.get_input_embeddings().register_forward_hook(
        lambda _m, ids, _o: read.append(ids[0].numel())
    )
    told: list[int] = []
    assert write_on(model, TOKENIZER, prompts, max_new_tokens=3, told=told.append) == expected
    trial = read.index(21)
    assert sum(read[trial:]) <= 21 + 20 + 20 * 3
    assert told == list(range(1, 21))


def test_rows_side_by_side_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, keys and values, 2 heads of 8 in fp32: 256 bytes a token; 10 tokens a row."""
    model, seen = tiny.tiny("Llama"), []
    monkeypatch.setattr(decode, "CACHE_BYTES", 256 * 10 * 5 + 100)
    model.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    write_on(model, TOKENIZER, [[tiny.BOS]] * 12, max_new_tokens=9, temperature=1.0)
    assert max(seen) == 5


# ---- bad input


def test_a_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(RequestError, match="a prompt is empty; give a model at least one token"):
        write_on(tiny.tiny("Llama"), TOKENIZER, [[1], []], max_new_tokens=1)
    assert write_on(tiny.tiny("Llama"), TOKENIZER, [], max_new_tokens=1) == []


@pytest.mark.parametrize("make", [lambda: tiny.tiny("Llama"), mamba])
def test_a_model_that_computes_no_numbers_is_named(make: Any) -> None:
    model = make()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    with pytest.raises(RequestError, match="logits are not numbers"):
        write_on(model, TOKENIZER, [[tiny.BOS], [7]], max_new_tokens=4, temperature=1.0)
