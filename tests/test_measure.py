"""What is read of a model: which texts, which splits, and what is refused."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from holdfast.data.rows import Source
from holdfast.errors import RequestError
from holdfast.measure import (
    WINDOWS,
    Measure,
    _fitting,
    context_length,
    require_finite,
    shared_documents,
    text_documents,
)
from holdfast.meters import Reading
from holdfast.meters.canary import Canary
from holdfast.meters.probes import Item

TEXTS = [{"text": f"it was day {n} and the cat sat on the mat."} for n in range(12)]
ITEMS = [Item(id=f"{n}", probe="sums", kind="nll", prompt="1 +", target=f" {n}.") for n in range(3)]


def canary_of(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Canary:
    file = tiny.jsonl(folder / "text.jsonl", rows)
    return Canary(sources=[Source(path=str(file))], **more)


class Pairs:
    """A tokenizer of two letters a token: the count is all that is asked of it."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * math.ceil(len(text) / 2)}


@settings(max_examples=40)
@given(st.text(alphabet=tiny.LETTERS, max_size=60), st.integers(1, 30))
def test_a_text_is_cut_where_both_tokenizers_still_have_room(text: str, most: int) -> None:
    """A letter a token is the stricter of the two, so the longest beginning is known."""
    assert _fitting(text, (tiny.letters(), Pairs()), most) == text[:most]
    assert _fitting(text, (Pairs(), Pairs()), most) == text[: 2 * most]


@settings(max_examples=15)
@given(st.lists(st.text(alphabet="abc .", min_size=1, max_size=90), min_size=1, max_size=4))
def test_shared_documents_are_the_same_text(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"text": f"x{text}"} for text in texts]
        tokenizer = tiny.letters()
        one, other = shared_documents(canary_of(Path(folder), rows), (tokenizer, tokenizer), 16)
    assert [d.id for d in one] == [d.id for d in other]
    whole: dict[str, str] = {}
    for d in one:
        text = tokenizer.decode(d.text.input_ids, skip_special_tokens=True)
        whole[d.cluster] = whole.get(d.cluster, "") + text
    wanted = dict.fromkeys(row["text"][: WINDOWS * 14] for row in rows)
    assert list(whole.values()) == list(wanted)


def test_chat_rows_are_refused_across_tokenizers(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(RequestError, match=r"text\.jsonl line 1: a chat row"):
        shared_documents(canary_of(tmp_path, rows), (tiny.letters(), tiny.letters()), 16)


def test_a_domain_has_so_many_documents_and_none_twice(tmp_path: Path) -> None:
    found = text_documents(canary_of(tmp_path, TEXTS * 2, max_documents=8), tiny.letters(), 64)
    assert len(found) == len({d.id for d in found}) == 8


def test_while_training_nothing_is_read_that_a_gate_reads(tmp_path: Path) -> None:
    documents = text_documents(canary_of(tmp_path, TEXTS), tiny.letters(), 64)
    measure = Measure(tiny.letters(), documents, ITEMS, documents)
    model = tiny.tiny("Llama")
    seen = {(r.meter, r.split) for r in measure.glance(model, 1, lesson=True, probes=True)}
    assert seen == {("canary", "selection"), ("lesson", "selection"), ("probe", "train")}
    assert {(r.meter, r.split) for r in measure.glance(model, 1)} == {("canary", "selection")}
    whole = measure.whole(model, 0)
    assert {("canary", "sealed"), ("lesson", "sealed"), ("probe", "sealed")} <= {
        (r.meter, r.split) for r in whole
    }
    assert measure.routed(model) is None


def test_the_context_is_the_smaller_of_model_and_tokenizer() -> None:
    model, tokenizer = tiny.tiny("Llama"), tiny.letters()
    assert context_length(model.config, tokenizer) == 64
    tokenizer.model_max_length = 20
    assert context_length(model.config, tokenizer) == 20


def test_a_reading_that_is_no_number_is_refused() -> None:
    sound = Reading("canary", "web", "sealed", 0, 1.0, 0.1, 1, "nats", items={"a": 1.0})
    require_finite([sound], "MODEL 'x'")
    for value in (math.nan, math.inf):
        broken = Reading("canary", "web", "sealed", 0, 1.0, 0.1, 1, "nats", items={"a": value})
        with pytest.raises(RequestError, match=r"^MODEL 'x': its logits .* canary 'web'"):
            require_finite([sound, broken], "MODEL 'x'")
