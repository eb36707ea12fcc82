"""The base's hidden states, taken once: the live base's own view of any text that was read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looking import EVERY, IDS, POSITIONS

import tiny
from holdfast import model as models
from holdfast.data.example import Role
from holdfast.data.packing import PackedRow, collate
from holdfast.reference import documents
from holdfast.reference.documents import by_length, key_of
from holdfast.reference.frozen import Frozen
from holdfast.reference.remembered import Remembered, size

WHOLE = EVERY.clone()
WHOLE[:, -1] = False
"""All positions at which there is a next token."""


def texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, tiny.VOCABULARY, n).tolist() for n in lengths]


def logits(base: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = base.head(base.hidden_MH)
    return out


@pytest.mark.parametrize("name", tiny.EXTRA)
def test_it_sees_what_a_copy_sees(name: str) -> None:
    """To the rounding of other batches; whatever becomes of the model afterwards."""
    model = tiny.tiny(name).train()
    copy = Frozen.copy_of(model)
    remembered = Remembered.of(model, IDS.tolist())
    assert model.training
    tiny.moved(model)
    seen, expected = (one.view(IDS, POSITIONS, WHOLE) for one in (remembered, copy))
    torch.testing.assert_close(logits(seen), logits(expected), atol=1e-5, rtol=1e-5)
    assert not seen.head.trained
    assert not seen.hidden_MH.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_head_that_will_move_is_copied(tied: bool) -> None:
    model = tiny.tiny("Llama", tie_word_embeddings=tied)
    head = model.get_output_embeddings().weight
    assert Remembered.of(model, IDS.tolist())._head.weight_VH.data_ptr() != head.data_ptr()
    model.requires_grad_(False)
    assert Remembered.of(model, IDS.tolist())._head.weight_VH is head


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_however_rows_are_packed_each_position_finds_its_own(
    lengths: list[int], random: Any
) -> None:
    """Against the model's own pass over each text alone, in the order of the batch."""
    model = tiny.tiny("Llama")
    rows = texts(lengths)
    remembered = Remembered.of(model, rows)
    order = random.sample(rows, len(rows))
    cut = random.randint(1, len(order))
    mask = [[False, *(random.random() < 0.7 for _ in row[1:])] for row in order]
    packed = [
        PackedRow(row, learned, Role.ANCHOR) for row, learned in zip(order, mask, strict=True)
    ]
    batch = collate([part for part in (packed[:cut], packed[cut:]) if part], pad_token_id=1)
    there = batch["roles"] == Role.ANCHOR
    seen = remembered.view(batch["input_ids"], batch["position_ids"], there)
    expected = [
        models.hidden_states(model, torch.tensor([row]), torch.arange(len(row))[None])[0, :-1][
            torch.tensor(learned[1:], dtype=torch.bool)
        ]
        for row, learned in zip(order, mask, strict=True)
    ]
    assert len(seen.hidden_MH) == int(there.sum())
    torch.testing.assert_close(seen.hidden_MH, torch.cat(expected).detach(), atol=1e-5, rtol=1e-5)


def test_the_same_text_is_kept_once_and_a_text_of_one_token_not_at_all() -> None:
    """Nothing is asked of a single token; by hand: 4 + 2 positions of H numbers of 4 bytes."""
    model = tiny.tiny("Llama")
    rows = [[5, 6, 7, 8, 9], [1, 2, 3], [5, 6, 7, 8, 9], [4]]
    kept = Remembered.of(model, rows).hidden_MH
    H = model.config.hidden_size
    assert kept.shape == (6, H)
    assert size(model, 6) == kept.numel() * kept.element_size() == 6 * H * 4


def test_an_unread_text_is_no_text_of_another() -> None:
    remembered = Remembered.of(tiny.tiny("Llama"), IDS.tolist())
    with pytest.raises(KeyError):
        remembered.view(IDS + 1, POSITIONS, WHOLE)


def test_nothing_asked_nothing_found() -> None:
    found = Remembered.of(tiny.tiny("Llama"), IDS.tolist()).view(
        IDS, POSITIONS, torch.zeros_like(EVERY)
    )
    assert len(found.hidden_MH) == 0


@given(st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=9), st.integers(2, 20))
def test_batches_hold_each_different_row_once(rows: list[list[int]], most: int) -> None:
    found = by_length(rows)
    assert {tuple(row) for row in rows if len(row) > 1} == {
        tuple(row.tolist()) for row in found.values()
    }
    assert all(key == key_of(row) for key, row in found.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BATCH_TOKENS", most)
        made = list(documents.batches(found.values()))
    assert [len(row) for batch in made for row in batch] == sorted(map(len, found.values()))
    assert all(len(batch) * len(batch[-1]) <= most or len(batch) == 1 for batch in made)
