"""Packed documents are as alone as documents in rows of their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast.lab.batches import IGNORED, pack

DOCUMENTS = st.lists(
    st.lists(st.integers(1, 30), min_size=2, max_size=16), min_size=30, max_size=60
)


@settings(deadline=None, max_examples=20)
@given(documents=DOCUMENTS)
def test_every_document_is_there_whole_and_in_its_place(documents: list[list[int]]):
    found = []
    for batch in pack(documents, rows=2, width=16, pad=0):
        assert batch.input_ids.shape == batch.position_ids.shape == batch.labels.shape == (2, 16)
        for tokens, positions, labels in zip(*(part.tolist() for part in batch), strict=True):
            starts = [i for i, position in enumerate(positions) if position == 0]
            for start, stop in zip(starts, [*starts[1:], 16], strict=True):
                if tokens[start] == 0:
                    assert labels[start:stop] == [IGNORED]
                    continue
                assert positions[start:stop] == list(range(stop - start))
                assert labels[start:stop] == [IGNORED, *tokens[start + 1 : stop]]
                found.append(tokens[start:stop])
    taken = documents[: len(found)]
    assert sorted(found) == sorted(taken)


def test_a_document_too_long_is_refused():
    with pytest.raises(ValueError, match="17"):
        list(pack([[1] * 17], rows=1, width=16, pad=0))


def test_no_document_attends_to_another():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=32,
        )
    ).eval()  # fmt: skip
    documents = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [17] * 13, [18] * 14]
    batch = next(pack(documents, rows=1, width=16, pad=0))
    with torch.no_grad():
        packed = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits[0]
        alone = [model(input_ids=torch.tensor([tokens])).logits[0] for tokens in documents[:3]]
    torch.testing.assert_close(packed[:12], torch.cat(alone))
