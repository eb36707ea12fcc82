"""Text that the base writes itself: its own distribution, seeded, kept."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

import tiny
from holdfast.data.example import Example, Role
from holdfast.data.self_generated import generate, generate_stream
from holdfast.errors import RequestError

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


def sampled(model: Any, tokenizer: Any, folder: Path, **changes: Any) -> list[Example]:
    settings = {"rows": 6, "max_new_tokens": 12, "temperature": 1.0, "seed": 0}
    return generate(model, tokenizer, **settings | changes, keep=folder / "kept.json")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny("Llama")


def test_the_same_seed_writes_the_same_and_the_global_generators_do_not_move(
    model: Any, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    runs = [
        sampled(model, tiny.letters(), tmp_path / str(i), seed=seed)
        for i, seed in enumerate((3, 3, 4))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert sampled(model, tiny.letters(), tmp_path / "later", seed=3) == runs[0] == runs[1]
    assert runs[2] != runs[0]


def test_rows_are_kept_and_read_back_only_for_the_same_settings(model: Any, tmp_path: Path) -> None:
    first = sampled(model, tiny.letters(), tmp_path)
    kept = json.loads((tmp_path / "kept.json").read_text())
    kept["rows"][0][0][1] = 999  # a mark that no sampling could leave
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    again = sampled(model, tiny.letters(), tmp_path)
    assert again[0].input_ids[1] == 999
    assert again[1:] == first[1:]
    changes = {"rows": 5}, {"max_new_tokens": 11}, {"temperature": 0.9}, {"seed": 1}
    for change in changes:
        fresh = sampled(model, tiny.letters(), tmp_path, **change)
        assert all(999 not in example.input_ids for example in fresh)
    other_start = tiny.letters(eos_token="</s>", pad_token="<pad>")
    assert sampled(model, other_start, tmp_path)[0].input_ids[0] == tiny.EOS


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_are_drawn_from_the_whole_softmax(temperature: float, tmp_path: Path) -> None:
    """Frequencies of 4,000 first tokens against the softmax, by chi-square (scipy).

    Cells with fewer than 5 expected are pooled, as is the rule; the seed is fixed, and a right
    sampler would fail for one seed in a thousand.
    """
    model = tiny.tiny("Llama", initializer_range=0.1)
    model.generation_config.update(**BENT)
    rows = sampled(
        model, tiny.letters(), tmp_path, rows=4000, max_new_tokens=1, temperature=temperature
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tiny.BOS]])).logits[0, 0].double()
    expected = (logits / temperature).softmax(-1) * len(rows)
    counts = Counter(example.input_ids[1] for example in rows)
    observed = torch.tensor([counts[token] for token in range(tiny.VOCABULARY)]).double()
    rare = expected < 5
    cells = [
        torch.cat([values[~rare], values[rare].sum().reshape(-1)])
        for values in (observed, expected)
    ]
    keep = cells[1] > 0
    assert int(keep.sum()) > 25
    assert chisquare(cells[0][keep], cells[1][keep]).pvalue > 0.001
    assert all(counts[token] for token in BENT["suppress_tokens"])
    assert model.generation_config.top_p == 0.5


def test_a_row_ends_with_its_end_token_and_is_scored_from_the_first_sampled_one(
    model: Any, tmp_path: Path
) -> None:
    rows = sampled(model, tiny.letters(), tmp_path, rows=100, max_new_tokens=20)
    assert len(rows) == 100
    ended = [row.input_ids for row in rows if tiny.EOS in row.input_ids]
    assert len(ended) > 10
    assert all(ids.index(tiny.EOS) == len(ids) - 1 for ids in ended)
    for row in rows:
        assert row.input_ids[0] == tiny.BOS
        assert len(row.input_ids) == 21 or row.input_ids[-1] == tiny.EOS
        assert row.loss_mask == [False] + [True] * (len(row.input_ids) - 1)
        assert row.domain == "self_generated"


def test_without_bos_a_text_begins_after_an_end(model: Any, tmp_path: Path) -> None:
    tokenizer = tiny.letters(eos_token="</s>", pad_token="<pad>")
    rows = sampled(model, tokenizer, tmp_path)
    assert {row.input_ids[0] for row in rows} == {tiny.EOS}
    assert all(len(row.input_ids) > 1 for row in rows)


def test_with_neither_bos_nor_eos_there_is_no_start(model: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="neither BOS nor EOS"):
        sampled(model, tiny.letters(pad_token="<pad>"), tmp_path)


# ---- chat


def test_a_chat_model_asks_itself_and_answers(model: Any, tmp_path: Path) -> None:
    """<user>, sampled words, <bot>, sampled words: the template's order, in 21 tokens."""
    rows = sampled(model, tiny.letters(tiny.CHAT), tmp_path, rows=40, max_new_tokens=20)
    assert len({tuple(row.input_ids) for row in rows}) == 40
    for row in rows:
        ids = row.input_ids
        assert ids[0] == tiny.USER
        assert tiny.BOT in ids
        question = ids[1 : ids.index(tiny.BOT)]
        assert len(question) <= 5  # a quarter of what the template's start leaves
        assert not {tiny.USER, tiny.BOS, tiny.EOS, tiny.PAD} & set(question)
        answer = ids[ids.index(tiny.BOT) + 1 :]
        assert answer
        assert len(ids) == 21 or answer[-1] == tiny.EOS
        assert row.loss_mask == [False] + [True] * (len(ids) - 1)
    assert len({tuple(row.input_ids[: row.input_ids.index(tiny.BOT)]) for row in rows}) > 20


LONG = "<bot>you are a kind helper.</s>" + tiny.CHAT
"""A template that begins with words of its own."""


@pytest.mark.parametrize("most", [32, 40, 63])
def test_a_row_holds_the_template_too(model: Any, tmp_path: Path, most: int) -> None:
    """`max_new_tokens` is chosen so that a row fits the longest sequence, template and all."""
    tokenizer = tiny.letters(LONG)
    start = tokenizer("<bot>you are a kind helper.</s><user>")["input_ids"]
    rows = sampled(model, tokenizer, tmp_path, max_new_tokens=most)
    for row in rows:
        assert row.input_ids[: len(start)] == start
        assert len(start) < len(row.input_ids) <= most + 1
        assert row.loss_mask == [i >= len(start) for i in range(len(row.input_ids))]


def test_a_template_that_leaves_no_room_is_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"opens with 25 tokens.*rows of 28; raise data.max"):
        sampled(model, tiny.letters(LONG), tmp_path, max_new_tokens=27)


def test_a_template_that_shows_no_words_falls_back_to_plain_text(
    model: Any, tmp_path: Path
) -> None:
    for template in ("nothing", "{{ messages[0].content }}"):
        rows = sampled(model, tiny.letters(template), tmp_path / template[:3])
        assert {row.input_ids[0] for row in rows} == {tiny.BOS}
        assert all(row.loss_mask[1:] == [True] * (len(row.input_ids) - 1) for row in rows)


# ---- the stream


def test_the_stream_holds_the_kept_rows(model: Any, tmp_path: Path) -> None:
    stream = generate_stream(
        model,
        tiny.letters(),
        name="anchors",
        share=0.25,
        rows=5,
        max_new_tokens=8,
        temperature=1.0,
        seed=2,
        folder=tmp_path,
    )
    kept = json.loads((tmp_path / "anchors.json").read_text())["rows"]
    assert (stream.role, stream.share) == (Role.ANCHOR, 0.25)
    assert [list(map(list, stream.fetch(i))) for i in range(5)] == kept
    assert stream.lengths.tolist() == [len(ids) for ids, _ in kept]


def test_progress_is_told_in_rows(model: Any, tmp_path: Path) -> None:
    told: list[int] = []
    sampled(model, tiny.letters(), tmp_path, rows=70, max_new_tokens=2, progress=told.append)
    assert told == [64, 70]
