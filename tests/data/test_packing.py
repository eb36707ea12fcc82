"""Packing: every document once, and no document sees another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from holdfast.data.example import Role
from holdfast.data.packing import (
    IGNORE,
    PackedRow,
    by_length,
    collate,
    deal_by_length,
    keeps_documents_apart,
    pack,
    pack_tight,
)

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": {**LLAMA_LIKE, "sliding_window": 5},
    "gemma3_text": {**LLAMA_LIKE, "sliding_window": 5},
    "phi3": {**LLAMA_LIKE, "pad_token_id": 0},
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **LLAMA_LIKE,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
# These do not heed the restart of the positions, by their mask or by a state that runs on.
HEEDLESS: dict[str, dict[str, Any]] = {
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "falcon": SMALL,
    "gpt_oss": {
        **LLAMA_LIKE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "pad_token_id": 0,
    },
    "lfm2": {**LLAMA_LIKE, "layer_types": ["conv", "full_attention"], "pad_token_id": 0},
}


@given(
    st.lists(st.integers(1, 20), max_size=60).flatmap(
        lambda lengths: st.tuples(st.just(lengths), st.integers(max([1, *lengths]), 40))
    )
)
def test_every_item_is_in_one_bin_and_no_bin_is_overfull(case: tuple[list[int], int]) -> None:
    lengths, width = case
    bins = pack(lengths, width)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in members) <= width for members in bins)
    assert bins == pack(lengths, width)


@given(st.lists(st.integers(1, 20), max_size=40))
def test_bins_are_those_of_first_fit_decreasing_written_plainly(lengths: list[int]) -> None:
    plain: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        for members in plain:
            if sum(lengths[other] for other in members) + lengths[item] <= 20:
                members.append(item)
                break
        else:
            plain.append([item])
    assert pack(lengths, 20) == plain


@given(
    st.lists(st.lists(st.integers(1, 40), max_size=20), min_size=1, max_size=2),
    st.integers(40, 120),
)
def test_a_tight_packing_leaves_a_fiftieth_over_or_has_the_fewest_positions_of_all_widths(
    groups: list[list[int]], width: int
) -> None:
    """Against every multiple of 8, one by one; a row is as wide as the widest, rounded up to 8."""

    def positions(bins: list[list[list[int]]]) -> int:
        rows = [
            [lengths[i] for i in one]
            for lengths, of in zip(groups, bins, strict=True)
            for one in of
        ]
        return -(-max(map(sum, rows), default=0) // 8) * 8 * len(rows)

    found = pack_tight(groups, width)
    for lengths, bins in zip(groups, found, strict=True):
        assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
        assert all(sum(lengths[item] for item in members) <= width for members in bins)
    longest = max((n for lengths in groups for n in lengths), default=1)
    widths = {min(w, width) for w in range(longest, width + 8) if w % 8 == 0}
    every = [w * sum(len(pack(lengths, w)) for lengths in groups) for w in widths if w % 8 == 0]
    spared = 1.02 * sum(map(sum, groups))
    assert positions(found) <= max(spared, min(every, default=spared))
    assert positions(found) <= positions([pack(lengths, width) for lengths in groups])


def test_rows_are_narrow_where_that_leaves_nothing_over() -> None:
    """26 documents of 20: 13 rows of 40 are full; at full width three rows of 256 are to two
    thirds.
    """
    (bins,) = pack_tight([[20] * 26], 256)
    assert [len(members) for members in bins] == [2] * 13


@given(st.lists(st.integers(1, 30), max_size=9), st.integers(32, 100))
def test_no_padded_batch_is_larger_than_the_limit(lengths: list[int], limit: int) -> None:
    batches = by_length(lengths, limit)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        rows = [[PackedRow([1] * lengths[i], [True] * lengths[i], Role.TASK)] for i in batch]
        assert collate(rows, pad_token_id=0)["input_ids"].numel() <= limit


def test_a_row_longer_than_the_limit_is_alone() -> None:
    assert by_length([9, 40, 8], 32) == [[1], [0, 2]]


@given(st.lists(st.integers(1, 30), max_size=6), st.integers(1, 3))
def test_the_largest_padded_batch_is_as_small_as_can_be(lengths: list[int], parts: int) -> None:
    """Against every way of dealing so few."""

    def largest(dealt: Iterable[Sequence[int]]) -> int:
        padded = [[-(-lengths[i] // 8) * 8 for i in part] for part in dealt if part]
        return max((len(part) * max(part) for part in padded), default=0)

    found = deal_by_length(lengths, parts)
    assert len(found) == parts
    assert sorted(index for part in found for index in part) == list(range(len(lengths)))
    every = (
        [[i for i, at in enumerate(places) if at == part] for part in range(parts)]
        for places in product(range(parts), repeat=len(lengths))
    )
    assert largest(found) == min(map(largest, every))


@pytest.mark.parametrize("length", [0, 6])
def test_an_item_that_no_bin_holds_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"item 1 has length {length}, but a bin holds 1 to 5"):
        pack([3, length], 5)


def test_collate_lays_documents_end_to_end() -> None:
    task = PackedRow([11, 12, 13], [False, False, True], Role.TASK)
    replay = PackedRow([21, 22], [False, True], Role.REPLAY)
    anchor = PackedRow([31, 32, 33, 34], [False, True, False, True], Role.ANCHOR)
    batch = collate([[task, replay], [anchor]], pad_token_id=9)
    x = IGNORE
    # Written out by hand from the definition: targets are the next token of the same document.
    assert batch["input_ids"].tolist() == [
        [11, 12, 13, 21, 22, 9, 9, 9],
        [31, 32, 33, 34, 9, 9, 9, 9],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["targets"].tolist() == [
        [12, 13, x, 22, x, x, x, x],
        [32, 33, 34, x, x, x, x, x],
    ]
    assert batch["roles"].tolist() == [[0, 1, 0, 2, 0, 0, 0, 0], [3, 0, 3, 0, 0, 0, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_an_empty_bin_is_a_row_of_padding() -> None:
    batch = collate([[]], pad_token_id=7)
    assert batch["input_ids"].tolist() == [[7] * 8]
    assert batch["targets"].tolist() == [[IGNORE] * 8]
    assert batch["roles"].sum() == 0


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16)])
def test_width_is_rounded_up(longest: int, width: int) -> None:
    row = PackedRow(list(range(longest)), [True] * longest, Role.TASK)
    assert collate([[row]], pad_token_id=0)["input_ids"].shape == (1, width)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_do_not_see_each_other(name: str, attention: str) -> None:
    """Each document's logits in a packed row equal those of the document alone."""
    assert _largest_difference(_model(name, attention), [[0, 1, 2], [3], [4]]) < 1e-5


@pytest.mark.parametrize("name", HEEDLESS)
def test_one_document_in_a_row_is_right_for_every_causal_model(name: str) -> None:
    model = _model(name, "eager")
    assert _largest_difference(model, [[0, 1, 2], [3], [4]]) > 1e-2
    assert _largest_difference(model, [[0], [1], [2], [3], [4]]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *HEEDLESS])
def test_which_models_keep_documents_apart_is_found_out(name: str, dtype: torch.dtype) -> None:
    model = _model(name, "eager").to(dtype).train()
    assert keeps_documents_apart(model) is (name in ARCHITECTURES)
    assert model.training


def test_documents_that_are_apart_in_one_row_only_are_not_kept_apart() -> None:
    """As in transformers' flash attention, which looks for packed documents in a batch of one."""
    model = _model("llama", "sdpa")
    given = model.forward

    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor, **more: Any) -> Any:
        whole = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return given(input_ids, position_ids=whole if len(input_ids) > 1 else position_ids, **more)

    model.forward = forward
    assert not keeps_documents_apart(model)


def test_a_cache_would_let_documents_see_each_other() -> None:
    """Why the module says ``use_cache=False``: with a cache transformers looks for no packing."""
    model = _model("llama", "sdpa")
    rows = [PackedRow([5, 6, 7], [True] * 3, Role.TASK), PackedRow([8, 9], [True] * 2, Role.TASK)]
    batch = collate([rows], pad_token_id=0)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        apart = model(**inputs, use_cache=False).logits
        leaking = model(**inputs, use_cache=True).logits
    assert (apart - leaking)[0, 3:5].abs().max() > 1e-4


def _largest_difference(model: Any, layout: list[list[int]]) -> float:
    """Between the logits of documents laid out in rows and those of each document alone."""
    random = torch.Generator().manual_seed(0)
    documents = [torch.randint(1, 64, (n,), generator=random).tolist() for n in (7, 1, 9, 12, 4)]
    rows = [PackedRow(ids, [True] * len(ids), Role.TASK) for ids in documents]
    batch = collate([[rows[i] for i in members] for members in layout], pad_token_id=0)
    difference = 0.0
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        for b, members in enumerate(layout):
            start = 0
            for i in members:
                alone = model(input_ids=torch.tensor([documents[i]]), use_cache=False).logits[0]
                end = start + len(documents[i])
                difference = max(difference, float((packed[b, start:end] - alone).abs().max()))
                start = end
    return difference


def _model(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**ARCHITECTURES, **HEEDLESS}[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # The default initialisation is so small that attention hardly matters; make it matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.float().eval()
