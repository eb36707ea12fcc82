"""Padded batches: every text once, whole, within the budget."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.meters.batches import batches
from holdfast.meters.scoring import Scored


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=9)),
    st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_every_text_is_there_once_and_whole(texts: list[list[tuple[int, bool]]], most: int) -> None:
    given_ = [Scored([i for i, _ in text], [on for _, on in text]) for text in texts]
    seen = []
    for batch in batches(given_, "cpu", most):
        assert batch.ids_BW.numel() <= max(most, batch.ids_BW.shape[1])
        seen += batch.numbers
        for row, number in enumerate(batch.numbers):
            text = given_[number]
            length = len(text.input_ids)
            real = batch.real_BW[row].tolist()
            assert real == [True] * length + [False] * (len(real) - length)
            assert batch.ids_BW[row, :length].tolist() == text.input_ids
            assert batch.scored_BW[row, : length - 1].tolist() == text.loss_mask[1:]
            assert not batch.scored_BW[row, length - 1 :].any()
            assert batch.positions_BW[row].tolist() == list(range(len(real)))
    assert sorted(seen) == list(range(len(texts)))
